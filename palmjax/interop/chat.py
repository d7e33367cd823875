"""Chat templates: Jinja, rendered as transformers renders them, without transformers."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palmjax.config import ConfigError
from palmjax.data.vocabulary import HuggingFace, Vocabulary

BESIDE = "source"
"""Folder beside a converted checkpoint with the tokenizer's files (`convert.BESIDE`)."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template, and the texts of the special tokens that it may name."""

    source: str
    tokens: dict[str, str]

    @classmethod
    def find(cls, file: str | None, model_dir: Path, vocabulary: Vocabulary) -> ChatTemplate | None:
        """The template in `file`, or the one that came with a converted checkpoint's tokenizer; None without either."""
        beside = model_dir / BESIDE
        settings_file, separate = beside / "tokenizer_config.json", beside / "chat_template.jinja"
        settings = json.loads(settings_file.read_text()) if settings_file.exists() else {}
        if file is not None:
            try:
                source = Path(file).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"chat_template={file} can't be read: {error}") from error
        else:
            source = separate.read_text(encoding="utf-8") if separate.exists() else settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = {one["name"]: one["template"] for one in source}.get("default")
        if source is None:
            return None
        tokens = {name: _text(value) for name, value in settings.items() if name.endswith("_token") and _text(value)}
        if isinstance(vocabulary, HuggingFace):
            ids = (("bos_token", vocabulary.bos_id), ("eos_token", vocabulary.eos_id))
            tokens = {name: vocabulary.token(i) for name, i in ids} | tokens
        return cls(source, tokens)

    def apply(self, history: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        """The text of a conversation; without a generation prompt it ends where the last message does.

        A template that refuses a system message is rendered without it, as lm-eval does.
        """
        from jinja2.exceptions import TemplateError

        try:
            return self._render(history, add_generation_prompt)
        except TemplateError:
            return self._render([m for m in history if m["role"] != "system"], add_generation_prompt)

    def _render(self, history: Sequence[dict[str, str]], add_generation_prompt: bool) -> str:
        text = self._compiled().render(
            messages=list(history),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **self.tokens,
        )
        if add_generation_prompt:
            return text
        last = history[-1]["content"]
        place = text.rindex(last.strip())
        as_it_is = text[place : place + len(last.lstrip())] == last.lstrip()
        return text[: place + len(last.lstrip() if as_it_is else last.strip())]

    def _compiled(self) -> Any:
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        def as_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
            return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        return environment.from_string(self.source)


def _text(token: Any) -> str:
    """The text of a special token, bare or with its properties; empty for none."""
    return token.get("content", "") if isinstance(token, dict) else token or ""
