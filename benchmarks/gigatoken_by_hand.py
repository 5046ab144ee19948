"""What one writes by hand to tokenise JSON lines with gigatoken: python gigatoken_by_hand.py CORPUS TOKENIZER_JSON OUT

A peer for benchmarks/preprocess.py: one process, ids as uint16 with the end-of-document token behind each document, and
lengths beside them. Nothing is checked; a document that spells the token out would be cut in two.
"""

import itertools
import json
import sys
from pathlib import Path

import awkward
import gigatoken
import numpy as np

END = "<|endoftext|>"
BATCH = 1_000

corpus, tokenizer, out = sys.argv[1:]
engine = gigatoken.Tokenizer(tokenizer)
with (
    Path(corpus).open(encoding="utf-8") as lines,
    Path(f"{out}.bin").open("wb") as bin_,
    Path(f"{out}.lengths").open("wb") as lengths,
):
    while batch := list(itertools.islice(lines, BATCH)):
        ids = engine.encode_batch([json.loads(line)["text"] + END for line in batch])
        awkward.to_numpy(awkward.flatten(ids)).astype(np.uint16).tofile(bin_)
        awkward.to_numpy(awkward.num(ids)).astype(np.int32).tofile(lengths)
