"""Held-out sentences, and which texts would tell a model what they say.

A text is compared after ``folding.loose_folding``: case, punctuation, width, spacing and invisible characters make no
difference. It is *in* the set if it is a held-out sentence or contains one whole (at word boundaries; anywhere in
scripts without spaces), as long as the sentence has ``min_contained_characters``. It is *near* the set if the sets of
character 5-grams of the two, counted exactly, have a Jaccard similarity of at least ``near`` and the text is at most
twice as long as the sentence. Declared languages are not asked: corpora spell them differently (``zh``,
``zho_Hans``), and a held-out sentence gives itself away under any label.
"""

# N texts

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatron_xalign import _native
from megatron_xalign.data.documents import read_probe
from megatron_xalign.data.folding import loose_folding
from megatron_xalign.errors import ConfigError, CorpusError

CLEAN, NEAR, IN = 0, 1, 2
"""What :meth:`ProbeSet.touch` says of a text."""
DEFAULT_NEAR = 0.7
"""A sentence of twelve words with one replaced by another still has about this similarity."""
DEFAULT_MIN_CONTAINED_CHARACTERS = 24
"""Shorter sentences ("See the following table.") occur in texts that have not seen the probe."""


class ProbeSet:
    """The sentences of a probe, ready to be looked for."""

    def __init__(
        self,
        sentences: Iterable[str],
        *,
        near: float = DEFAULT_NEAR,
        min_contained_characters: int = DEFAULT_MIN_CONTAINED_CHARACTERS,
    ) -> None:
        """Build the index; 2,000 sentences take a fraction of a second.

        Args:
            sentences: held-out sentences of any languages.
            near: Jaccard similarity from which on a text is near a sentence, in [0.5, 1].
            min_contained_characters: of a folded sentence (an ideograph counts two), for it to be looked for inside
                longer texts.

        Raises:
            ConfigError: a setting is out of range.
            CorpusError: a sentence has no letter or digit, or there is no sentence.
        """
        kept = list(sentences)
        if not kept:
            raise CorpusError("the probe holds no sentence.")
        if not 0.5 <= near <= 1.0:
            raise ConfigError(
                f"near={near} is outside [0.5, 1]; it is a Jaccard similarity of two texts' sets of character 5-grams."
            )
        if min_contained_characters < 1:
            raise ConfigError(f"min_contained_characters={min_contained_characters} must be at least 1.")
        for sentence, folded in zip(kept, loose_folding().fold(kept), strict=True):
            if not folded:
                raise CorpusError(f"the probe sentence {sentence!r} has no letter or digit to be recognised by.")
        self._index = _native.ProbeIndex(loose_folding(), kept, near, min_contained_characters)
        self.sentences = len(kept)
        """How many there are, repeats included."""
        content = json.dumps([kept, near, min_contained_characters], ensure_ascii=False)
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()
        """Of the sentences and settings, as hexadecimal text; part of what decides a job's output."""

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        near: float = DEFAULT_NEAR,
        min_contained_characters: int = DEFAULT_MIN_CONTAINED_CHARACTERS,
    ) -> Self:
        """Build it from a probe file, JSON lines ``{"id": ..., "texts": {language: text, ...}}``; all languages count.

        Raises:
            ConfigError: a setting is out of range.
            CorpusError: the file is missing, damaged or empty, or a sentence has no letter or digit.
        """
        sentences = [text for document in read_probe(path) for text in document.texts.values()]
        try:
            return cls(sentences, near=near, min_contained_characters=min_contained_characters)
        except CorpusError as error:
            raise CorpusError(f"{path}: {error}") from None

    def touch(self, texts: list[str]) -> NDArray[np.uint8]:
        """uint8 [N]: :data:`CLEAN`, :data:`NEAR` or :data:`IN` the set."""
        return self._index.touch(texts)

    def contaminates(self, texts: list[str]) -> NDArray[np.bool_]:
        """bool [N]: True for texts that are, contain or resemble a held-out sentence."""
        return self.touch(texts) != CLEAN
