"""Role tags: what the model's own chat template writes around a turn."""

from __future__ import annotations

from typing import Any

import pytest
from pml_words import CHATML, Bytes, chats, prompt, schema

from kvstore.composition import Composition, Placement, Text
from kvstore.errors import BadInput

OPEN = "<|im_start|>"
SYSTEM = "<system>You plan.<module name='m'>miami</module></system>"
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
LAST_THINKS = CHATML.replace(
    "{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
)
BEGINS = "<s>" + CHATML
FOLDED = (
    "{% set said = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set said.system = '<<' + m.content + '>>' %}"
    "{% elif m.role == 'user' %}<s>[INST] {{ said.system }}{{ m.content }} [/INST]{% set said.system = '' %}"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


def text(tokenizer: Any, composition: Composition) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(composition.token_ids))


def test_roles_are_written_as_the_chat_template_does() -> None:
    tokenizer = chats()
    made = schema(SYSTEM, tokenizer=tokenizer)
    found = prompt(made, "<m/><user>Go</user><assistant/>")
    messages = [{"role": "system", "content": "You plan.miami"}, {"role": "user", "content": "Go"}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert found.token_ids == whole
    assert found.position_ids == list(range(len(whole)))
    kinds = [type(part) for part in found.parts]
    assert (
        kinds == [Placement] * 3 + [Text] * 4
    )  # the system's turn with miami in it; the user's; the reply's beginning


@pytest.mark.parametrize(
    ("template", "system", "empty", "user", "assistant"),
    [
        (CHATML, f"{OPEN}system\n", "", f"{OPEN}user\n", f"{OPEN}assistant\n"),
        (DEFAULT, f"{OPEN}system\n", f"{OPEN}system\nBe kind.<|im_end|>\n", f"{OPEN}user\n", f"{OPEN}assistant\n"),
        (LAST_THINKS, f"{OPEN}system\n", "", f"{OPEN}user\n", f"{OPEN}assistant\n"),
        (BEGINS, f"<s>{OPEN}system\n", "<s>", f"{OPEN}user\n", f"{OPEN}assistant\n"),
        (STRICT, None, None, f"{OPEN}user\n", f"{OPEN}assistant\n"),
        (FOLDED, None, None, "<s>[INST] ", " "),
    ],
    ids=["plain", "a system of its own", "the last turn differs", "a beginning", "no system", "system in user's turn"],
)
def test_what_templates_write(template: str, system: str | None, empty: str | None, user: str, assistant: str) -> None:
    tokenizer = chats(template)
    end = {"user": " [/INST]", "assistant": " </s>"} if template is FOLDED else {}
    for role, before in (("system", system), ("user", user), ("assistant", assistant)):
        if before is None:
            with pytest.raises(
                BadInput, match=f"line 1, column 18, <{role}>: the chat template has no text of its own"
            ):
                schema(f"<{role}>x</{role}>", tokenizer=tokenizer)
            continue
        found = prompt(schema(f"<{role}>x</{role}>", tokenizer=tokenizer), "")
        assert text(tokenizer, found) == f"{before}x{end.get(role, '<|im_end|>' + chr(10))}"
    if empty:
        assert text(tokenizer, prompt(schema("<system/>", tokenizer=tokenizer), "")) == empty


def test_an_empty_assistant_opens_the_reply() -> None:
    thinks = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    for template, opened in (
        (CHATML, f"{OPEN}assistant\n"),
        (thinks, "<|im_start|>assistant\n<think>"),
        (FOLDED, " "),
    ):
        tokenizer = chats(template)
        assert text(tokenizer, prompt(schema("", tokenizer=tokenizer), "<assistant/>")) == opened


def test_roles_span_modules_and_are_no_modules() -> None:
    made = schema("<user>one<module name='m'>two</module>three</user>", roles={"user": ("[", "]")})
    assert bytes(prompt(made, "<m/>").token_ids) == b"[onetwothree]"
    assert bytes(prompt(made, "<user><m/>four</user>five").token_ids) == b"[one[twothree]four]five"
    assert prompt(made, "<m/>").position_ids == list(range(13))


def test_roles_of_ones_own_need_no_template() -> None:
    roles = {"system": ("S", "s", "none"), "user": ("U", "u"), "assistant": ("A", "a")}
    made = schema("", roles=roles)
    said = "<system/><user/><assistant/><system>1</system><user>2</user><assistant>3</assistant>"
    assert bytes(prompt(made, said).token_ids) == b"noneUuAS1sU2uA3a"


@pytest.mark.parametrize("tokenizer", [Bytes(), chats(None)], ids=["plain", "Hugging Face"])
def test_role_tags_need_a_chat_template(tokenizer: Any) -> None:
    with pytest.raises(BadInput) as refused:
        schema("<user>hi</user>", tokenizer=tokenizer)
    assert str(refused.value) == (
        "schema, line 1, column 18, <user>: role tags need a tokenizer with a chat template; "
        "or give roles={'user': (text before, text behind)}"
    )
    with pytest.raises(BadInput, match=r"^prompt, line 1, column 20, <system>: role tags need"):
        prompt(schema("x", tokenizer=tokenizer), "<system>hi</system>")


def test_a_tokenizer_is_called_without_special_tokens() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chats()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 0)])
    assert tokenizer.encode("hi") == [0, 104, 105]
    assert prompt(schema("hi", tokenizer=tokenizer), "").token_ids == [104, 105]
