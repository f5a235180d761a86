"""Prompts to token ids, once, with the checkpoint's own tokenizer: both engines then receive ids, never text."""

from __future__ import annotations

from typing import Any

from moediag.engines.checkpoint import Checkpoint
from moediag.errors import CheckpointError, PromptsError
from moediag.prompts import Prompt
from moediag.run.files import digest_of
from moediag.run.records import Tokenizer


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The checkpoint's own tokenizer.

    Raises:
        CheckpointError: it does not load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizer classes raise anything; all mean: not usable
        raise CheckpointError(
            f"{checkpoint.path}: its tokenizer does not load ({type(error).__name__}: {error})"
        ) from None


def token_map(checkpoint: Checkpoint, trust_remote_code: bool) -> dict[str, int] | None:
    """Token -> id of a checkpoint's tokenizer; None where it does not load."""
    try:
        return dict(load_tokenizer(checkpoint, trust_remote_code).get_vocab())
    except CheckpointError:
        return None


def map_digest(tokens: dict[str, int] | None) -> str | None:
    """Digest of a token map, whatever files it came from."""
    return None if tokens is None else digest_of(sorted(tokens.items()))


def refuse_other_tokenizer(tokenizer: Tokenizer, other: Checkpoint, trust_remote_code: bool) -> None:
    """Refuse a checkpoint whose tokenizer gives tokens other ids than the run's does.

    Args:
        tokenizer: the run's.

    Raises:
        CheckpointError: it does, or nothing shows that it does not.
    """
    if other.digests["tokenizer_sha256"] == tokenizer.files_sha256:
        return
    found = map_digest(token_map(other, trust_remote_code))
    if tokenizer.map_sha256 is None or found is None:
        raise CheckpointError(
            f"{other.path}: its tokenizer's files are others than the run's, and a token map could not be loaded to "
            "compare them; give a checkpoint with the run's tokenizer"
        )
    if found != tokenizer.map_sha256:
        raise CheckpointError(
            f"{other.path}: its tokenizer maps tokens to other ids than the run's, so the same ids would be other "
            "text; give a checkpoint with the run's tokenizer"
        )


def tokenise(checkpoint: Checkpoint, prompts: list[Prompt], trust_remote_code: bool) -> list[list[int]]:
    """Token ids of every prompt, by the checkpoint's own tokenizer where they are not given.

    Raises:
        PromptsError: a prompt without tokens, or with a token id that the model does not have.
        CheckpointError: the tokenizer does not load.
    """
    has_ids = all(prompt.token_ids is not None for prompt in prompts)
    tokenizer = None if has_ids else load_tokenizer(checkpoint, trust_remote_code)
    ids = [_prompt_ids(tokenizer, prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if not tokens:
            raise PromptsError(f"{prompt.where}: the prompt has no tokens")
    _check_vocabulary(checkpoint, prompts, ids)
    return ids


def _prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    if prompt.token_ids is not None:
        return list(prompt.token_ids)
    if prompt.text is not None:
        return list(tokenizer(prompt.text, verbose=False)["input_ids"])
    if not getattr(tokenizer, "chat_template", None):
        raise PromptsError(f"{prompt.where}: messages given, but the tokenizer has no chat template; use prompt")

    def rendered(tools: list[Any] | None) -> str:
        messages = list(prompt.messages or ())
        return str(tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False))

    try:
        text = rendered(list(prompt.tools) or None)
        has_dropped_tools = bool(prompt.tools) and text == rendered(None)
    except Exception as error:  # templates are programs that raise what they like at messages they dislike
        raise PromptsError(f"{prompt.where}: the chat template refuses these messages ({error})") from None
    if has_dropped_tools:
        raise PromptsError(
            f"{prompt.where}: the checkpoint's chat template has no place for tools; leave them out, or render the "
            "prompt yourself and give it as text"
        )
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _check_vocabulary(checkpoint: Checkpoint, prompts: list[Prompt], ids: list[list[int]]) -> None:
    n_vocabulary = checkpoint.n_vocabulary
    for prompt, tokens in zip(prompts, ids, strict=True):
        largest = max([*tokens, *(prompt.completion_token_ids or ())])
        if n_vocabulary and largest >= n_vocabulary:
            raise PromptsError(f"{prompt.where}: token id {largest} is outside the vocabulary of {n_vocabulary}")


def check_lengths(
    prompts: list[Prompt],
    prompt_ids: list[list[int]],
    completions: list[list[int]] | None,
    room: int | None,
) -> None:
    """Check every prompt's length against the room there is: vLLM needs some for at least one token more.

    Args:
        room: longest sequence that the model, or the user, allows [tokens]; None = no limit.

    Raises:
        PromptsError: names the first prompt that is too long.
    """
    for i, (prompt, tokens) in enumerate(zip(prompts, prompt_ids, strict=True)):
        length = len(tokens) + (len(completions[i]) if completions else 0)
        if room is not None and length >= room:
            what = "prompt and completion" if completions else "prompt"
            raise PromptsError(
                f"{prompt.where}: {what} of {length} tokens, the model allows {room} with at least one "
                "to follow; shorten it or leave it out"
            )
