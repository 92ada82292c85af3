"""Every claim of the families matrix, on the few families of the quick suite; all of them: benchmarks/families.py."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def families():
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("families", BENCHMARKS / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    torch.set_default_dtype(torch.float32)
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi3", "gpt2", "qwen2_moe", "jamba"])
def test_every_applicable_claim_holds(families, name, tmp_path):
    row = families.check_family(name, str(tmp_path))
    assert families.is_exact(row), families._one_line(row)
    assert row["refusals"] == []
    assert row[families.METHOD] == "pruned"


def test_a_cell_that_does_not_hold_is_not_exact(families):
    assert not families.is_exact({"channels": "exact", "module": "off by 1e-3"})
    assert not families.is_exact({"fails": "ModelError: ..."})
    assert not families.is_exact({"channels": "-"})
