"""Attributes by dotted name, and those that a forward pass reads."""

import pytest
import torch
from torch import nn

from slimgraph.attributes import get_attribute, integers_read, set_attribute


class Settings:
    def __init__(self, width):
        self.width = width


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.heads = 3
        self.unread = 7
        self.shape = (4, 5)

    def forward(self, input_ids):
        return input_ids.view(-1, 1) * self.heads + self.config.width + self.shape[1]


def test_a_value_in_a_shared_object_is_set_for_one_module_only():
    settings = Settings(6)
    first, second = Block(settings), Block(settings)
    set_attribute(first, "config.width", 2)
    assert (get_attribute(first, "config.width"), get_attribute(second, "config.width")) == (2, 6)


def test_a_place_in_a_tuple_is_set_and_stays_a_tuple():
    block = Block(Settings(6))
    set_attribute(block, "shape.1", 9)
    assert block.shape == (4, 9)
    assert get_attribute(block, "shape.1") == 9


def test_only_what_the_forward_pass_reads_is_reported_and_the_model_stays_as_it_was():
    block = Block(Settings(6))
    read = integers_read(block, torch.ones(1, 2, dtype=torch.long))[""]
    assert read == {"heads": 3, "config.width": 6, "shape.0": 4, "shape.1": 5}
    assert type(block) is Block
    assert type(block.config) is Settings


class Keeping(Block):
    """Keeps a cache unless told otherwise, and cannot."""

    def forward(self, input_ids, use_cache=True):
        if use_cache:
            raise ValueError("no layer keeps a cache")
        return super().forward(input_ids)


class Passing(Keeping):
    """Hands on what it does not know itself."""

    def forward(self, input_ids, **options):
        return super().forward(input_ids, **options)


@pytest.mark.parametrize("cls", [Keeping, Passing])
def test_the_forward_pass_is_the_one_that_is_traced_without_a_cache(cls):
    ids = torch.ones(1, 2, dtype=torch.long)
    assert integers_read(cls(Settings(6)), ids) == integers_read(Block(Settings(6)), ids)
