"""The demo's tokenizer: one token per byte.

Invariants: the id of a byte is its value (0-255), the end-of-text token's id is 256; any UTF-8 text
comes back unchanged; a text's ids never depend on its neighbours, so prompt ids + response ids are
the ids of the whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moediag.demo.corpus import END_OF_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT_ID = 256
VOCAB_SIZE = 257

# The models know documentation, not dialogue: roles would be noise to them, so messages are paragraphs.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
)


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer: byte-level BPE with the 256 byte tokens and no merges.

    BPE without merges rather than a tokenizer class of our own: ``AutoTokenizer`` and vLLM load it
    from the checkpoint folder without any code of moediag.

    Args:
        max_length: longest text that the models take [tokens].

    Returns:
        A fast tokenizer with ``END_OF_TEXT`` as end-of-text and padding token and a chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: byte for byte, char in enumerate(_byte_characters())}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        # The default would drop the space before punctuation in decoded text.
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, in byte order (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(stand_ins)) for byte in range(256)]
