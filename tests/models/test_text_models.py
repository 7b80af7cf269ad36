"""Plain text checkpoints end to end, with transformers as the oracle: what its `save_pretrained` writes, our tokenizer,
loader, decoder and engine read, and greedy answers are the same ids.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationMixin,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from omnilmm.config import EngineConfig, InputHandling
from omnilmm.messages import (
    ChatRequest,
    Conversation,
    Delta,
    Embedding,
    FinishReason,
    GenerateCall,
    Prompt,
    Sampling,
    TextPart,
    Turn,
)
from omnilmm.pipeline import Pipeline

NUM_ANSWER = 20
LAYERS, HEAD_DIM = 3, 16
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,  # far enough from uniform that no two tokens are nearly as likely
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
QUESTIONS = [
    "What is the capital of France?",
    "Name 3 rivers, 14 hills and 159 towns.",
    "naïve café 图片 🙂",
    "   leading and trailing spaces   ",
    "def f(x):\n\treturn x ** 2\n",
    "a",
    "Tell me about the weather in the north of the country, and about the lakes and forests there. " * 2,
    "Is <|endoftext|> a token?",
]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    model: GenerationMixin
    tokenizer: PreTrainedTokenizerFast

    def greedy(self, ids: tuple[int, ...], num_tokens: int = NUM_ANSWER) -> tuple[int, ...]:
        """The answer of transformers, its end token included."""
        whole = self.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=num_tokens, do_sample=False
        )
        return tuple(whole[0, len(ids) :].tolist())


# -- checkpoints --------------------------------------------------------------------------------------


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As SmolLM2's: byte-level BPE, digits apart, ChatML, no begin token of its own."""
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(QUESTIONS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def tied_llama(folder: Path, vocab_size: int) -> GenerationMixin:
    config = LlamaConfig(**SIZES, vocab_size=vocab_size, tie_word_embeddings=True)
    config.rope_parameters["rope_theta"] = 1e5
    return saved(LlamaForCausalLM(config), folder)


def llama(folder: Path, vocab_size: int) -> GenerationMixin:
    return saved(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=vocab_size, head_dim=24, rms_norm_eps=1e-5)), folder)


def mistral(folder: Path, vocab_size: int) -> GenerationMixin:
    """Grouped keys; the answers stay within the sliding window, beyond which we never serve."""
    sizes = SIZES | {"num_key_value_heads": 2}
    return saved(MistralForCausalLM(MistralConfig(**sizes, vocab_size=vocab_size, sliding_window=200)), folder)


def minicpm(folder: Path, vocab_size: int) -> GenerationMixin:
    """MiniCPM's three scales. transformers has no such class; Granite has the same three under other names."""
    scale_emb, scale_depth, dim_model_base = 12.0, 1.4, 16
    config = GraniteConfig(
        **SIZES,
        vocab_size=vocab_size,
        tie_word_embeddings=True,
        embedding_multiplier=scale_emb,
        residual_multiplier=scale_depth / LAYERS**0.5,
        logits_scaling=SIZES["hidden_size"] / dim_model_base,
        attention_multiplier=HEAD_DIM**-0.5,
        rms_norm_eps=1e-5,
    )
    model = GraniteForCausalLM(config)
    folder.mkdir(exist_ok=True)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    written = SIZES | {
        "model_type": "minicpm",
        "architectures": ["MiniCPMForCausalLM"],
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "scale_emb": scale_emb,
        "scale_depth": scale_depth,
        "dim_model_base": dim_model_base,
    }
    (folder / "config.json").write_text(json.dumps(written))
    return model.eval()


def saved(model: Any, folder: Path) -> GenerationMixin:
    model.save_pretrained(folder)
    return model.eval()


KINDS: list[Callable[[Path, int], GenerationMixin]] = [tied_llama, llama, mistral, minicpm]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(11)
    model = request.param(folder, len(tokenizer))
    tokenizer.save_pretrained(folder)
    return Checkpoint(folder, model, tokenizer)


# -- answers ------------------------------------------------------------------------------------------


def load(checkpoint: Checkpoint, engine: EngineConfig | None = None) -> Pipeline:
    return Pipeline.load(str(checkpoint.folder), dtype="float32", device="cpu", engine=engine)


def conversation(question: str) -> Conversation:
    return Conversation((Turn("system", (TextPart("Be brief."),)), Turn("user", (TextPart(question),))))


async def no_vectors(key: str) -> Embedding | None:
    raise AssertionError("a text model asked for picture vectors")


async def answer_ids(pipeline: Pipeline, prompt: Prompt) -> tuple[int, ...]:
    call = GenerateCall("test", prompt, (), Sampling(max_tokens=NUM_ANSWER, stop_ids=(2,)))
    return tuple([i async for batch in pipeline.engine.generate(call, fetch=no_vectors) for i in batch.ids])


async def test_prompts_have_the_ids_of_the_checkpoints_own_tokenizer(checkpoint: Checkpoint) -> None:
    async with load(checkpoint) as pipeline:
        for question in QUESTIONS:
            rendered = pipeline.card.template.render(conversation(question), InputHandling.ORIGINAL)
            messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
            theirs = checkpoint.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert rendered.ids == tuple(theirs)


async def test_greedy_answers_are_those_of_transformers(checkpoint: Checkpoint) -> None:
    """All at once through an engine that must cut prompts in chunks, queue and preempt: the answers do not change."""
    tight = EngineConfig(num_blocks=14, block_size=16, max_step_tokens=48, max_sequences=5)
    async with load(checkpoint, tight) as pipeline:
        prompts = [pipeline.card.template.render(conversation(q), InputHandling.SAFE) for q in QUESTIONS]
        ours = await asyncio.gather(*(answer_ids(pipeline, prompt) for prompt in prompts))
        assert await pipeline.engine.drain(timeout_s=10)
        stats = pipeline.engine.stats()
        assert stats.num_preemptions > 0
        assert stats.blocks_used == 0
    assert ours == [checkpoint.greedy(prompt.ids) for prompt in prompts]
    assert len(set(ours)) > len(QUESTIONS) // 2  # the answers depend on the questions


async def test_the_text_of_an_answer(checkpoint: Checkpoint) -> None:
    async with load(checkpoint) as pipeline:
        request = ChatRequest("test", conversation(QUESTIONS[0]), max_tokens=NUM_ANSWER, temperature=0.0)
        *deltas, finished = [piece async for piece in pipeline.answer(request)]
        ids = checkpoint.greedy(pipeline.card.template.render(request.conversation, InputHandling.SAFE).ids)
    text = "".join(delta.text for delta in deltas if isinstance(delta, Delta))
    assert text == checkpoint.tokenizer.decode(ids, skip_special_tokens=True)
    assert finished.usage.completion_tokens == len(ids)
    assert finished.finish is (FinishReason.STOP if ids[-1] == 2 else FinishReason.LENGTH)
