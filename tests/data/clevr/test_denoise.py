"""The noise filter: noise falls, edges of colour and of features stay, outliers go."""

from __future__ import annotations

import numpy as np
import pytest

from ssdir.data.clevr.denoise import denoise


def halves(clean: np.ndarray, deviation: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, deviation, (2, *clean.shape))
    return (clean + noise).astype(np.float32)


def test_noise_falls_on_a_smooth_surface() -> None:
    clean = np.broadcast_to(np.linspace(0.3, 0.5, 96)[None, :, None], (64, 96, 3))
    noisy = halves(clean, 0.05)
    before = np.std(noisy.mean(0) - clean)
    after = np.std(denoise(noisy, np.zeros((64, 96, 1), np.float32)) - clean)
    assert before == pytest.approx(0.05 / 2**0.5, rel=0.05)
    assert after < before / 5


def test_without_noise_nothing_changes() -> None:
    clean = np.random.default_rng(1).uniform(0.4, 0.6, (24, 32, 3))
    same = denoise(halves(clean, 0.0), np.zeros((24, 32, 1), np.float32))
    np.testing.assert_allclose(same, clean, atol=2e-3)


def test_edges_of_features_stay() -> None:
    clean = np.full((48, 64, 3), 0.4)
    clean[:, 32:] = 0.44
    features = (clean[..., :1] > 0.42).astype(np.float32)
    result = denoise(halves(clean, 0.05), features)
    assert np.abs(result[:, 31].mean() - 0.4) < 0.008
    assert np.abs(result[:, 32].mean() - 0.44) < 0.008


def test_a_bright_path_in_one_half_is_taken_out() -> None:
    noisy = halves(np.full((32, 32, 3), 0.2), 0.01)
    noisy[0, 16, 16] = 50.0
    assert denoise(noisy, np.zeros((32, 32, 1), np.float32))[16, 16].max() < 0.4
