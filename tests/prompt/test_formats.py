"""Chat templates of text models are recognised to the letter, and anything else is refused."""

import json

import pytest
from prompt_cases import OMNI, turn, user, written

from omnilmm.config import Family, InputHandling
from omnilmm.errors import CheckpointError, InvalidRequest
from omnilmm.messages import Conversation
from omnilmm.prompt.template import load_template

ZEPHYR = json.loads((OMNI / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOLLM = CHATML.replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SMOLLM_SYSTEM
    + "<|im_end|>\n' }}{% endif %}",
)
MINICPM_TEXT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{'<用户>' + message['content'].strip() + '<AI>'}}"
    "{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)
TALK = Conversation((turn("user", " hi\n"), turn("assistant", "ho "), turn("user", "bye")))
BRIEF = Conversation((turn("system", "Be brief."), turn("user", "hi")))


def said(folder, conversation):
    template = load_template(Family.TEXT, folder)
    prompt = template.render(conversation, InputHandling.SAFE)
    assert prompt.spans == ()
    assert prompt.penalty_ids == prompt.ids  # a text model's penalty has seen the whole prompt
    parts = (
        item if isinstance(item, str) else template.tokenizer.token_bytes(item).decode()
        for item in written(template.tokenizer, prompt.ids)
    )
    assert prompt == template.render(conversation, InputHandling.ORIGINAL)
    return "".join(parts)


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        CHATML.replace("\n", "\\n"),
        CHATML.replace("'", '"'),
        CHATML.replace("{{'", "{{ '").replace("'}}", "' }}"),
        "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}" + CHATML,
    ],
)
def test_chatml(byte_level, configure, source):
    configure(byte_level, chat_template=source)
    assert said(byte_level, TALK) == (
        "<|im_start|>user\n hi\n<|im_end|>\n<|im_start|>assistant\nho <|im_end|>\n"
        "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert load_template(Family.TEXT, byte_level).eos_ids == (2,)


def test_chatml_with_a_system_message_of_its_own(byte_level, configure):
    configure(byte_level, chat_template=SMOLLM, eos_token="<|endoftext|>")
    assert said(byte_level, user("hi")) == (
        f"<|im_start|>system\n{SMOLLM_SYSTEM}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert said(byte_level, BRIEF) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert load_template(Family.TEXT, byte_level).eos_ids == (0, 2)  # either ends an answer


def test_a_template_in_a_file_of_its_own_or_in_a_list(byte_level, configure):
    configure(byte_level, chat_template=[{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}])
    assert said(byte_level, BRIEF).startswith("<|im_start|>system\nBe")
    configure(byte_level, chat_template="something else")
    (byte_level / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    assert said(byte_level, BRIEF).startswith("<|im_start|>system\nBe")


def test_zephyr(sentence_model, configure):
    folder = sentence_model()
    configure(folder, chat_template=ZEPHYR)
    assert said(folder, TALK) == ("<s><|user|>\n hi\n</s>\n<|assistant|>\nho </s>\n<|user|>\nbye</s>\n<|assistant|>\n")
    assert said(folder, BRIEF) == "<s><|system|>\nBe brief.</s>\n<|user|>\nhi</s>\n<|assistant|>\n"
    configure(folder, add_bos_token=False)
    assert said(folder, TALK).startswith("<|user|>")


def test_minicpm(sentence_model, configure):
    folder = sentence_model()
    configure(folder, chat_template=MINICPM_TEXT)
    assert said(folder, TALK) == "<s><用户>hi<AI>ho<用户>bye<AI>"
    assert said(folder, BRIEF) == "<s>Be brief.<用户>hi<AI>"


@pytest.mark.parametrize(
    "source",
    [
        None,
        "",
        "{{ messages }}",
        CHATML + "{{ bos_token }}",
        CHATML.replace("<|im_end|>", "<|eot_id|>"),
        SMOLLM.replace(SMOLLM_SYSTEM, "{{ cycler.__init__.__globals__.os.popen('id').read() }}"),
        ZEPHYR.replace("eos_token", "'</s>'"),
    ],
)
def test_unknown_formats_are_refused_and_not_executed(byte_level, configure, source):
    configure(byte_level, chat_template=source)
    with pytest.raises(CheckpointError, match="chat"):
        load_template(Family.TEXT, byte_level)


def test_chatml_needs_its_control_tokens(sentence_model, configure):
    folder = sentence_model()
    configure(folder, chat_template=CHATML)
    with pytest.raises(CheckpointError, match="im_start"):
        load_template(Family.TEXT, folder)


def test_text_models_take_no_pictures(byte_level, configure):
    configure(byte_level, chat_template=CHATML)
    with pytest.raises(InvalidRequest) as caught:
        load_template(Family.TEXT, byte_level).render(user(1, "hi"), InputHandling.SAFE)
    assert caught.value.param == "messages[0].content[0]"
