"""The alternatives that a GPU has, computed here: stand-ins for packages have their signatures."""

import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from bench import alternatives, peers


@pytest.fixture
def package(monkeypatch):
    def install(**functions):
        (name,) = functions
        module = ModuleType(
            {"top_k": "flashinfer", "batch_kmeans_Euclid": "flash_kmeans"}.get(name, name)
        )
        setattr(module, name, functions[name])
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


@pytest.mark.parametrize("name", ["flex", "sdpa_flash", "sdpa_each"])
def test_attention_is_that_of_every_sequence_alone(monkeypatch, name):
    monkeypatch.setattr(peers, "_compiled_flex", lambda: flex_attention)
    lengths = (5, 9, 2)
    q = torch.randn(16, 4, 16)
    k, v = torch.randn(2, 16, 2, 16).unbind()
    expected = alternatives.sdpa_each(q, k, v, lengths)
    torch.testing.assert_close(peers.attention(name, q, k, v, lengths)(), expected)


def test_scores_by_flash_colreduce(package):
    def flash_colreduce(query, key, reduction, is_causal=False, scale=None):
        assert query.shape[:2] == key.shape[:2]
        assert (reduction, is_causal, scale) == ("mean", False, None)
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        return weights.mean(dim=2)  # [B, H, N]

    package(flash_colreduce=flash_colreduce)
    q, k = torch.randn(3, 6, 16), torch.randn(20, 2, 16)
    torch.testing.assert_close(peers.flash_colreduce(q, k), alternatives.grouped_scores(q, k))


def test_top_k_by_flashinfer(package):
    def top_k(input, k, sorted=False, deterministic=False, tie_break=0):
        values, indices = input.topk(k)
        return values.flip(1), indices.flip(1).int()

    package(top_k=top_k)
    scores = torch.randn(50)
    chosen = peers.flashinfer_topk_and_sort(scores, 20)
    assert torch.equal(chosen, alternatives.topk_and_sort(scores, 20))


def test_merging_by_flash_kmeans_gives_means_of_clusters(package):
    def batch_kmeans_Euclid(x, n_clusters, max_iters=100, tol=0.0):
        assert (x.shape, max_iters) == ((2, 12, 4), 2)
        return torch.arange(12).expand(2, -1) % n_clusters, x[:, :n_clusters], max_iters

    package(batch_kmeans_Euclid=batch_kmeans_Euclid)
    x = torch.randn(2, 12, 8)
    expected = x.view(2, 4, 3, 8).mean(dim=1)
    torch.testing.assert_close(peers.flash_kmeans(x, 3, 2), expected)


def test_nothing_of_a_gpu_is_asked_for_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peers.on_gpu("flex", "flash_kmeans") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(peers, "find_spec", lambda module: module == "torch")
    assert peers.on_gpu("flex", "flash_kmeans") == ["flex"]
