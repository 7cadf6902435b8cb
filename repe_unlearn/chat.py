"""Render a prompt with a tokenizer's chat template and keep track of where its characters went."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from repe_unlearn.errors import InputError

if TYPE_CHECKING:
    from repe_unlearn.contrast import Example

__all__ = ["Renderer"]

# A message that no prompt contains, to see what the template writes before and after the user's words.
_MARK = "\ue000\ue001\ue000"


@dataclass(frozen=True, slots=True)
class Renderer:
    """What a chat template writes around a user message.

    Attributes:
        before: text before the user's words (without a beginning-of-sequence token that the tokenizer adds
            anyway).
        after: text after them, up to the point where the assistant goes on.
        tokenizer: the tokenizer whose template it is.
        system: the system message, if any.
        stripped: length of the beginning-of-sequence text left out of `before`.
    """

    before: str
    after: str
    tokenizer: Any
    system: str | None
    stripped: int

    @classmethod
    def of(cls, tokenizer: Any, system: str | None = None) -> Renderer:
        """Render a probe message once.

        Args:
            tokenizer: a Hugging Face tokenizer with a chat template.
            system: system message; None sends none.

        Returns:
            The text around a user message.

        Raises:
            InputError: no chat template, or the template refuses or rewrites the message.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{type(tokenizer).__name__} has no chat template, so prompts cannot be chat turns; use an "
                "instruction-tuned model, or set tokenizer.chat_template"
            )
        before, found, after = _apply(tokenizer, _MARK, system).partition(_MARK)
        if not found:
            raise InputError(
                "the chat template does not repeat the user's message unchanged; render the texts yourself"
            )
        stripped = _automatic_bos(tokenizer, before)
        return cls(before[stripped:], after, tokenizer, system, stripped)

    def render(self, example: Example, cut: int) -> Example:
        """Render the first `cut` characters as the user message; the rest follows as the assistant's opening.

        Args:
            example: the prompt.
            cut: number of leading characters that the user says.

        Returns:
            The example with its text rendered and every span moved; a span that crosses `cut` is refused.

        Raises:
            InputError: the template rewrites this text (other than trimming whitespace), or a span crosses
                `cut`.
        """
        said, rest = example.text[:cut], example.text[cut:]
        whole = _apply(self.tokenizer, said, self.system)[self.stripped :]
        for kept in (said, said.strip()):
            if whole == self.before + kept + self.after:
                break
        else:
            raise InputError(
                f"the chat template rewrites the text {said!r}, so spans in it cannot be followed"
            )
        trimmed = len(said) - len(said.lstrip()) if kept != said else 0

        def moved(span: tuple[int, int]) -> tuple[int, int]:
            start, end = span
            if start >= cut:
                return start - cut + len(whole), end - cut + len(whole)
            if end > cut:
                raise InputError(
                    f"the span {span} of {example.text!r} crosses the end of the prompt at {cut}"
                )
            start, end = (min(max(p - trimmed, 0), len(kept)) + len(self.before) for p in span)
            return start, end

        said_prompt_end = moved((0, example.prompt_end))[1] if example.prompt_end else 0
        return replace(
            example,
            text=whole + rest,
            focus=None if example.focus is None else moved(example.focus),
            words=tuple(map(moved, example.words)),
            prompt_end=len(whole) if rest else said_prompt_end,
        )


def _apply(tokenizer: Any, said: str, system: str | None) -> str:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": said})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        hint = "; this model may know no system role, try system=None" if system is not None else ""
        raise InputError(f"the chat template failed: {error}{hint}") from error


def _automatic_bos(tokenizer: Any, before: str) -> int:
    # Without this, tokenizing the rendered text would put the token there twice, and no model has seen that.
    bos = getattr(tokenizer, "bos_token", None)
    if not bos or not before.startswith(bos):
        return 0
    added = list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return len(bos) if added else 0
