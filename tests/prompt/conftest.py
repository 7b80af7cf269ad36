from functools import partial
from pathlib import Path

import pytest
from prompt_cases import MINICPM, OMNI, set_config, train_sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from omnilmm.config import Family
from omnilmm.prompt.template import Template, load_template

SENTENCES = (
    "You are a helpful assistant.",
    "What is in the picture? There are two cats and a dog on the table.",
    "user system assistant user system assistant <|user|> <|system|> <|assistant|>",
    "这张图片里有什么？",
)


@pytest.fixture(scope="session")
def omni() -> Template:
    return load_template(Family.OMNILMM_12B, OMNI)


@pytest.fixture(scope="session")
def minicpm() -> Template:
    return load_template(Family.OMNILMM_3B, MINICPM)


@pytest.fixture(scope="session")
def oracle() -> Tokenizer:
    """The 12B tokenizer through the library its original used."""
    return Tokenizer.from_file(str(OMNI / "tokenizer.json"))


@pytest.fixture
def byte_level(tmp_path: Path) -> Path:
    """A byte-level checkpoint as SmolLM2's: no BOS is added, and it is the same token as the start of a message."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    set_config(tmp_path, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>")
    return tmp_path


@pytest.fixture
def sentence_model(tmp_path: Path):
    """Writes a small SentencePiece checkpoint; keywords go to the trainer."""
    return partial(train_sentencepiece, tmp_path, SENTENCES)


@pytest.fixture
def configure():
    """Changes entries of a checkpoint's tokenizer_config.json."""
    return set_config
