"""Prune a model in Python.

python examples/prune.py MODEL TEXT_FILE OUT
"""

from __future__ import annotations

import sys

import slimgraph
from slimgraph.pretrained import load_model, load_tokenizer


def main(source: str, text: str, out: str) -> None:
    model, tokenizer = load_model(source), load_tokenizer(source)
    print(slimgraph.inspect(model))

    result = slimgraph.prune(model, calibration=text, tokenizer=tokenizer, ratio=0.2, samples=32, seq_len=128)
    print(result)
    for group, cut in result.plan.cuts.items():
        print(f"{group}: {cut.kept} of {cut.units}")

    result.save(out, tokenizer=tokenizer)
    again = slimgraph.load(out)  # or transformers' AutoModelForCausalLM.from_pretrained, once slimgraph is imported
    print(sum(p.numel() for p in again.parameters()))


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
