"""Metrics by quartile of imbalance: summed as Megatron sums them, they are the quartile's own means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bdpo.losses import LossFunction, PairLogProbs, registry
from megatron_bdpo.training.job import each_once
from megatron_bdpo.training.reference import options_from_data
from megatron_bdpo.training.reporting.part_means import public_metrics
from megatron_bdpo.training.reporting.quartiles import (
    is_of_a_quartile,
    quartile_edges,
    quartile_report,
)


def report_of(values, imbalance, edges):
    """Of pairs that count alike."""
    return quartile_report(values, imbalance, edges, torch.ones(len(imbalance), dtype=torch.float64), len(imbalance))


def as_megatron_does(reports):
    """Sums over microbatches, then sum by count."""
    return {name: float(total[0] / total[1]) for name in reports[0] for total in [sum(r[name] for r in reports)]}


def test_means_public_metrics():
    random = np.random.default_rng(3)
    imbalance, margin = random.gamma(2, size=103), random.normal(size=103)
    edges = quartile_edges(imbalance)
    parts = np.split(np.arange(103), [1, 40, 41, 90])  # packs of other sizes; some without pairs of a quartile
    reports = [
        report_of({"rewards/margins": torch.from_numpy(margin[part])}, torch.from_numpy(imbalance[part]), edges)
        for part in parts
    ]
    found = public_metrics(as_megatron_does(reports))
    quartile = np.searchsorted(edges.numpy(), imbalance)
    for q in range(4):
        assert found[f"rewards/margins/imbalance_q{q + 1}"] == pytest.approx(margin[quartile == q].mean(), rel=1e-5)
        assert found[f"pairs/imbalance_q{q + 1}"] == pytest.approx((quartile == q).mean(), rel=1e-6)
    assert len(found) == 8
    assert all(map(is_of_a_quartile, found))


def test_quartile_without_pairs_is_left_out():
    report = report_of({"loss": torch.ones(2)}, torch.tensor([0.1, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
    found = public_metrics({"loss": 1.0} | as_megatron_does([report]))
    assert found == {
        "loss": 1.0,
        "loss/imbalance_q1": 1.0,
        "loss/imbalance_q4": 1.0,
        "pairs/imbalance_q1": 0.5,
        "pairs/imbalance_q4": 0.5,
    }


def test_pack_without_pairs_counts_nothing():
    report = report_of({"loss": torch.zeros(0)}, torch.zeros(0), torch.tensor([1.0, 2.0, 3.0]))
    assert all(torch.equal(entry, torch.zeros(2)) for entry in report.values())


def test_pairs_weigh_what_they_weigh_in_the_loss():
    """Two groups, of one pair and of two: their means count alike."""
    imbalance, loss = torch.tensor([0.5, 9.0, 9.0]).double(), torch.tensor([1.0, 2.0, 4.0]).double()
    weight = torch.tensor([1, 0.5, 0.5]).double()
    found = public_metrics(as_megatron_does([quartile_report({"loss": loss}, imbalance, _EDGES, weight, 2)]))
    assert found["loss/imbalance_q4"] == 3.0 and found["pairs/imbalance_q1"] == found["pairs/imbalance_q4"] == 0.5


_EDGES = torch.tensor([1.0, 2.0, 3.0])


def test_a_pair_on_an_edge_is_in_the_lower_quartile():
    imbalance = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    report = report_of({}, torch.from_numpy(imbalance), quartile_edges(imbalance))
    assert [float(entry[0]) for entry in report.values()] == [2, 1, 1, 1]


def test_imbalances_are_computed_in_blocks(monkeypatch):
    """Of all pairs in their order, whatever the size of a block."""
    random = torch.Generator().manual_seed(1)
    values = -torch.rand((3, 10, 2), generator=random, dtype=torch.float64)
    pairs = PairLogProbs.of_pairs(torch.full((10, 2), 3), values[0], values[1], values[2])
    loss = LossFunction(registry.get("bdpo"), registry.build_options("bdpo", {}))
    expected = ((values[1] - values[2]) / 3).diff(dim=1).abs().ravel()
    for block in (1, 3, 10, 20):
        monkeypatch.setattr(options_from_data, "_BLOCK", block)
        assert options_from_data._imbalances(loss, pairs) == pytest.approx(expected.numpy(), rel=1e-12)


def test_each_pair_where_it_comes_first():
    found = each_once(np.array([7, 3, 7]), np.array([], np.int64), np.array([0, 3, 9]))
    assert found.tolist() == [7, 3, 0, 9]
    assert each_once(np.array([], np.int64)).tolist() == []
