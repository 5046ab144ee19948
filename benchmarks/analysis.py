"""What do the measures of alignment cost, against the way studies compute them?

    python benchmarks/analysis.py [--quick] [--rounds N]

Average precision: 4,000 sentences of two languages, 132,096 neurons (24 layers of 5,504), both languages. The peer is a
loop over neurons and languages around scikit-learn's `average_precision_score`; it is linear in neurons, so it runs on
some of them, copied to lie together, and is scaled up, which the answer says. PWCCA: 20,000 sentences, 2,048 features,
float32. The peers hold all sentences: the recipe of google/svcca (covariance, pseudo-inverses, SVD, projections and
their QR), which studies run, for `svcca`; and a singular value decomposition of each representation and of their
product for `definition`. Ours sees blocks of 500 sentences and keeps sums. Of rank-deficient input the peer's value is
compared with --quick only. One thread each (OMP_NUM_THREADS=1), and ours of average precision with two as well. CPU
seconds; contestants take turns, each PWCCA in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from measure import Command, answer, interleaved, print_costs, print_result

_SEED = 1234
_BLOCK_SENTENCES = 500


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the neurons, an eighth of the features")
    parser.add_argument("--rounds", type=int, help="3 of average precision and 1 of PWCCA, or 1 with --quick")
    parser.add_argument("--features", type=int, help="of PWCCA, with 10 sentences for each: 2048 and 20,000, or 256")
    parser.add_argument("--only", choices=("average_precision", "pwcca"), help="one of the two questions")
    parser.add_argument("--mode", choices=("definition", "svcca"), help="one of the two ways to PWCCA")
    parser.add_argument("--contestant", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        print(json.dumps(_contestant(options.contestant[0], Path(options.contestant[1]))))
        return 0
    answers = []
    if options.only != "pwcca":
        answers += _average_precision(options.quick, options.rounds or (1 if options.quick else 3))
    if options.only != "average_precision":
        answers += _pwcca(options.quick, options.rounds or 1, options.features, options.mode)
    print_result(answers)
    return 0


# --- average precision ---------------------------------------------------------------------------------------------


def _average_precision(quick: bool, rounds: int) -> list[dict[str, Any]]:
    from sklearn.metrics import average_precision_score

    from megatron_xalign.analysis import neurons

    num_neurons, num_looped, per_language = (13_210, 60, 2000) if quick else (132_096, 500, 2000)
    language_D = np.repeat([0, 1], per_language)
    scores_DN = _scores(language_D, num_neurons)
    every = num_neurons // num_looped
    # Each neuron's scores together: in the whole array the loop would also wait for memory.
    looped_ND = np.ascontiguousarray(scores_DN[:, : num_looped * every : every].T)

    def loop() -> np.ndarray:
        return np.array([
            [
                average_precision_score(language_D == language, looped_D) for looped_D in looped_ND
            ]
            for language in (0, 1)
        ])

    def ours(threads: int) -> Any:
        return lambda: neurons.average_precision_by_language(scores_DN, language_D, 2, num_threads=threads)

    costs = interleaved({"ours": ours(1), "ours, 2 threads": ours(2), f"loop, {num_looped} neurons": loop}, rounds)
    print(f"average precision of {num_neurons:,} neurons, {len(language_D):,} sentences, 2 languages")
    print_costs(costs)
    looped = costs[f"loop, {num_looped} neurons"]
    scaled = looped.cpu_seconds * num_neurons / num_looped
    found = costs["ours"].result[:, : num_looped * every : every]
    difference = float(np.abs(found - looped.result).max())
    print(f"the loop scaled up to all neurons: {scaled:.0f} CPU s; largest difference of a score: {difference:.1e}")
    facts = {
        "peer_extrapolated_from_neurons": num_looped, "largest_difference": difference, "rounds": rounds,
        "input_mb": round(scores_DN.nbytes / 1e6),
    }  # fmt: skip
    return [
        answer(
            f"average precision, {num_neurons:,} neurons: against a scikit-learn loop (extrapolated)",
            ours=costs["ours"].cpu_seconds, peer=scaled, goal=100, unit="CPU s", better="lower", **facts,
        ),
        answer(
            f"average precision, {num_neurons:,} neurons, 2 threads: CPU against a scikit-learn loop (extrapolated)",
            ours=costs["ours, 2 threads"].cpu_seconds, peer=scaled, goal=None, unit="CPU s", better="lower",
            wall_seconds=[round(costs[name].wall_seconds, 2) for name in ("ours", "ours, 2 threads")],
        ),
        answer(
            f"average precision, {num_neurons:,} neurons: memory beyond the input",
            ours=max(costs[name].rss_growth_bytes for name in ("ours", "ours, 2 threads")) / 1e6, peer=None, goal=1000,
            unit="MB", better="lower",
        ),
    ]  # fmt: skip


def _scores(language_D: np.ndarray, num_neurons: int) -> np.ndarray:
    """float32 [D, N]: products of two normal variables, as SwiGLU makes them, some neurons leaning to a language."""
    generator = np.random.default_rng(_SEED)
    lean_N = generator.normal(0, 0.5, num_neurons).astype(np.float32) * (generator.random(num_neurons) < 0.3)
    scores_DN = np.empty((len(language_D), num_neurons), np.float32)
    for document, language in enumerate(language_D):
        own_N = generator.standard_normal(num_neurons, np.float32)
        own_N *= generator.standard_normal(num_neurons, np.float32)
        scores_DN[document] = own_N + lean_N * language
    return scores_DN


# --- PWCCA ---------------------------------------------------------------------------------------------------------


def _pwcca(quick: bool, rounds: int, features: int | None, mode: str | None) -> list[dict[str, Any]]:
    width, num = (256, 2560) if quick else (2048, 20_000)
    if features is not None:
        width, num = features, 10 * features
    answers = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in ("full rank", "rank-deficient"):
            _write_representations(folder, num, width, deficient=kind != "full rank")
            asked = ("svcca", "definition") if mode is None else (mode,)
            # The recipe of google/svcca has no value for rank-deficient input; the other peer is left out for its time.
            modes = [one for one in asked if kind == "full rank" or (quick and one == "definition")]
            names = [f"{who} {one}" for one in asked for who in ("ours", "peer") if who == "ours" or one in modes]
            costs = interleaved(
                {
                    contestant: Command([sys.executable, __file__, "--contestant", contestant, name])
                    for contestant in names
                },
                rounds,
            )
            print(f"\nPWCCA of {num:,} sentences, {width:,} features, {kind}")
            print_costs(costs)
            told = {contestant: json.loads(cost.result) for contestant, cost in costs.items()}
            for contestant, figures in told.items():
                print(
                    f"{contestant:16} value {figures['value']:.9f} ranks {figures['ranks']} {figures['cpu']:.1f} CPU s "
                    f"{figures['mb']:.0f} MB beyond the input"
                )
            for one in modes:
                ours, peer = told[f"ours {one}"], told[f"peer {one}"]
                what = f"PWCCA {one}, {num:,} x {width:,}, {kind}"
                facts = {"values": [ours["value"], peer["value"]], "ranks": ours["ranks"]}
                answers += [
                    answer(f"{what}: CPU", ours=ours["cpu"], peer=peer["cpu"], goal=4, unit="CPU s", better="lower",
                           difference=abs(ours["value"] - peer["value"]), **facts),
                    answer(f"{what}: memory beyond the input", ours=ours["mb"], peer=peer["mb"], goal=10, unit="MB",
                           better="lower"),
                ]  # fmt: skip
    return answers


def _write_representations(folder: Path, num: int, width: int, deficient: bool) -> None:
    """Residual-like: a power-law spectrum, a shared part, a common mean; if asked, a tenth of the features are sums."""
    generator = np.random.default_rng(_SEED)
    scale = (1 + np.arange(width)) ** -0.25
    shared = generator.standard_normal((num, width), np.float32) * scale
    for side in ("a", "b"):
        own = shared * np.linspace(1, 0, width) + 0.5 * generator.standard_normal((num, width), np.float32) * scale
        turn = np.linalg.qr(generator.standard_normal((width, width)))[0]
        acts = (own @ turn + generator.normal(0, 0.3, width)).astype(np.float32)
        if deficient:
            tenth = width // 10
            # Sums of two, exact enough in float32 to be dependent at a relative variance of 1e-6.
            acts[:, -tenth:] = acts[:, :tenth] + acts[:, tenth : 2 * tenth]
        np.save(folder / f"{side}.npy", acts)


def _contestant(name: str, folder: Path) -> dict[str, Any]:
    """One way to one value, in a process of its own: value, CPU seconds, memory above the loaded input."""
    import time

    from measure import run_once

    who, mode = name.split()
    acts = [np.load(folder / f"{side}.npy") for side in ("a", "b")]
    if who == "ours":
        from megatron_xalign.analysis.moments import PairMoments
        from megatron_xalign.analysis.similarity import pwcca_from_moments

        def run() -> Any:
            moments = PairMoments(acts[0].shape[1], acts[1].shape[1], "cpu")
            for start in range(0, len(acts[0]), _BLOCK_SENTENCES):
                moments.update(*(side[start : start + _BLOCK_SENTENCES] for side in acts))
            return pwcca_from_moments(moments, mode, consume=True)  # type: ignore[arg-type]
    else:
        peer = _by_recipe if mode == "svcca" else _by_decompositions

        def run() -> Any:
            return peer(*acts)

    begin = time.process_time()
    cost = run_once(run)
    told = {"cpu": time.process_time() - begin, "mb": cost.rss_growth_bytes / 1e6}
    if isinstance(cost.result, float):
        return told | {"value": cost.result, "ranks": None}
    return told | {"value": cost.result.value, "ranks": [cost.result.rank_a, cost.result.rank_b]}


def _by_decompositions(acts_a: np.ndarray, acts_b: np.ndarray) -> float:
    """The published definition by an SVD of everything, directions below a relative variance of 1e-6 left out."""
    sides = []
    for acts in (acts_a, acts_b):
        left, size, axes = np.linalg.svd(acts.astype(np.float64) - acts.mean(axis=0, dtype=np.float64),
                                         full_matrices=False)  # fmt: skip
        keep = size**2 > 1e-6 * size[0] ** 2
        sides.append((left[:, keep], size[keep], axes[keep]))
    turned, rho, _ = np.linalg.svd(sides[0][0].T @ sides[1][0], full_matrices=False)
    weights = np.abs((turned.T * sides[0][1]) @ sides[0][2]).sum(axis=1)
    return float(weights @ rho / weights.sum())


def _by_recipe(acts_a: np.ndarray, acts_b: np.ndarray) -> float:
    """google/svcca's steps for two representations of one width, [features, sentences] as there."""
    x, y = acts_a.T, acts_b.T
    covariance = np.cov(x, y)
    width = len(x)
    sxx, sxy, syy = covariance[:width, :width], covariance[:width, width:], covariance[width:, width:]
    x_max, y_max = np.abs(sxx).max(), np.abs(syy).max()
    sxx, syy, sxy = sxx / x_max, syy / y_max, sxy / np.sqrt(x_max * y_max)

    def root(matrix: np.ndarray) -> np.ndarray:
        values, axes = np.linalg.eigh(matrix)
        return axes @ np.diag(np.sqrt(values)) @ axes.T

    root_x, root_y = root(np.linalg.pinv(sxx)), root(np.linalg.pinv(syy))
    u, rho, _ = np.linalg.svd(root_x @ sxy @ root_y)
    mean = x.mean(axis=1, keepdims=True, dtype=np.float64)
    directions = u.T @ (x - mean) + mean
    q, _ = np.linalg.qr(directions.T)
    weights = np.abs(q.T @ x.T).sum(axis=1)
    return float(weights / weights.sum() @ rho)


if __name__ == "__main__":
    raise SystemExit(main())
