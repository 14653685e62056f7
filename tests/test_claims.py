"""Claims find what is planted, miss what is not, and refuse what the arms cannot answer."""

import numpy as np
import pytest

from jaxdecoder.ablation import statistics
from jaxdecoder.ablation.claims import Outcome, check, judge
from jaxdecoder.ablation.grid import METRICS, read
from jaxdecoder.errors import UserError

NANO = """
[model]
context_length = 8
d_model = 16
n_layers = 2
n_heads = 2
"""


def ablation(tmp_path, claims, *, seeds=5, rates="[1e-3, 2e-3, 4e-3]", factors=None):
    """An ablation with these claims over two norms and three head counts."""
    (tmp_path / "base.toml").write_text(NANO)
    factors = factors or 'model.norm = ["layernorm", "none"]\nmodel.n_heads = [1, 2, 4]'
    listed = ", ".join(f"'{claim}'" for claim in claims)
    (tmp_path / "x.toml").write_text(
        f'base = "base.toml"\nseeds = {seeds}\nlearning_rates = {rates}\n'
        f"claims = [{listed}]\n" + ("" if "[[" in factors else "[factors]\n") + f"{factors}\n"
    )
    return read(tmp_path / "x.toml")


def outcomes(asked, loss, noise=0.01, seed=0):
    """Results whose losses are `loss(norm, heads, rate)`, a share of every seed's, and noise."""
    draw = np.random.default_rng(seed)
    shares = draw.normal(0, 0.1, size=asked.spec.seeds)
    found = []
    for m in asked.members:
        values = dict(m.arm.values)
        mean = loss(values.get("model.norm"), values.get("model.n_heads"), m.learning_rate)
        value = 2.0 + mean + shares[m.seed] + draw.normal(0, noise)
        metrics = dict(zip(METRICS, (value, value - 0.1, 0.1 + mean), strict=True))
        found.append(Outcome(m.arm, m.learning_rate, m.seed, metrics))
    return found


def bowl(centre, depth=0.1):
    """A loss that is lowest at a learning rate."""
    return lambda rate: depth * np.log2(rate / centre) ** 2


def verdicts(tmp_path, claims, loss, **options):
    noise, seed = options.pop("noise", 0.01), options.pop("seed", 0)
    asked = ablation(tmp_path, claims, **options)
    return [v.verdict for v in judge(asked, outcomes(asked, loss, noise, seed))]


def handicapped(norm, heads, rate):
    """Without a norm 0.1 worse, with every doubling of the heads a flatter bowl."""
    return 0.1 * (norm == "none") + bowl(2e-3, 0.2 / heads)(rate)


class TestPlantedEffects:
    def test_are_found(self, tmp_path):
        claims = {
            "norm=layernorm beats norm=none": "supported",
            "norm=none beats norm=layernorm": "refuted",
            "norm=layernorm beats norm=none by 0.05": "supported",
            "norm=layernorm beats norm=none by 0.15": "refuted",
            "norm=none does not beat norm=layernorm": "supported",
            "norm=layernorm,n_heads=4 beats norm=none,n_heads=1": "supported",
            "widening n_heads narrows the learning-rate sensitivity": "supported",
            "raising n_heads raises learning-rate sensitivity": "refuted",
            "the effect of norm does not depend on the learning rate": "supported",
            "the effect of norm does not depend on n_heads": "supported",
            "the best learning rate does not depend on norm": "supported",
        }
        assert verdicts(tmp_path, claims, handicapped) == list(claims.values())

    def test_that_turn_with_the_learning_rate_are_refuted(self, tmp_path):
        def loss(norm, heads, rate):
            return 0.1 * (norm == "none") * np.sign(rate - 1.5e-3)

        claim = "the effect of norm does not depend on the learning rate"
        assert verdicts(tmp_path, [claim], loss) == ["refuted"]

    def test_that_move_the_best_learning_rate_are_refuted(self, tmp_path):
        def loss(norm, heads, rate):
            return bowl(4e-3 if norm == "none" else 1e-3)(rate)

        claim = "the best learning rate does not depend on norm"
        assert verdicts(tmp_path, [claim], loss) == ["refuted"]

    def test_on_overfitting_are_found(self, tmp_path):
        def loss(norm, heads, rate):
            return -0.05 * np.log2(heads)

        claim = "raising n_heads lowers overfitting"
        assert verdicts(tmp_path, [claim], loss) == ["supported"]

    def test_are_compared_at_the_best_rate_of_each_arm(self, tmp_path):
        """At 1e-3 alone the second norm would win."""

        def loss(norm, heads, rate):
            return bowl(4e-3)(rate) if norm == "layernorm" else bowl(1e-3)(rate) + 0.05

        assert verdicts(tmp_path, ["norm=layernorm beats norm=none"], loss) == ["supported"]


def test_a_planted_null_is_found_no_more_often_than_the_level_says(tmp_path, monkeypatch):
    """200 reports of four claims each about arms that differ in nothing."""
    # No verdict asks for these, and they take most of the time.
    monkeypatch.setattr(statistics, "RESAMPLES", 2)
    monkeypatch.setattr(statistics, "detectable", lambda deviation, n, **told: 0.0)
    claims = [
        "norm=layernorm beats norm=none",
        "n_heads=4 beats n_heads=1",
        "raising n_heads lowers validation loss",
        "the effect of norm does not depend on n_heads",
    ]
    asked = ablation(tmp_path, claims, rates="[1e-3]")
    wrong = 0
    for seed in range(200):
        found = judge(asked, outcomes(asked, lambda norm, heads, rate: 0.0, seed=seed))
        wrong += any(verdict.verdict != "undecided" for verdict in found)
    # 10 of 200 are expected at most; 18 would be seen once in a hundred such tests.
    assert wrong <= 18


def test_two_arms_are_a_pair_whatever_else_differs(tmp_path):
    asked = ablation(
        tmp_path,
        ["norm=layernorm beats norm=none"],
        factors='[[arms]]\nmodel.norm = "layernorm"\nmodel.n_heads = 1\n'
        '[[arms]]\nmodel.norm = "none"\nmodel.n_heads = 4\n',
    )
    (verdict,) = judge(asked, outcomes(asked, lambda norm, heads, rate: 0.1 * (norm == "none")))
    assert verdict.verdict == "supported"


class TestRefusals:
    @pytest.mark.parametrize(
        ("claim", "message"),
        [
            ("norm=batchnorm beats norm=none", "no arm has norm=batchnorm; there are layernorm"),
            ("activation=relu beats norm=none", "activation is no factor here; there are"),
            ("norm=none is nice", "no known form; there are: A"),
            ("raising norm lowers validation loss", "no higher and lower values"),
            ("raising n_heads lowers beauty", '"beauty" is no measure; there are validation loss'),
            ("the effect of n_heads does not depend on norm", "needs two values, not 3"),
            ("norm=none,n_heads=1 beats norm=none,n_heads=9", "no arm has n_heads=9"),
        ],
    )
    def test_name_the_claim_and_what_would_do(self, tmp_path, claim, message):
        with pytest.raises(UserError) as error:
            check(ablation(tmp_path, [claim]))
        assert message in str(error.value)
        assert f'claim "{claim}"' in str(error.value)
        assert "x.toml" in str(error.value)

    def test_of_one_seed(self, tmp_path):
        with pytest.raises(UserError, match="one seed gives none"):
            check(ablation(tmp_path, ["norm=none beats norm=layernorm"], seeds=1))

    def test_of_one_learning_rate(self, tmp_path):
        for claim in (
            "the best learning rate does not depend on norm",
            "raising n_heads lowers learning-rate sensitivity",
            "the effect of norm does not depend on the learning rate",
        ):
            with pytest.raises(UserError, match="learning_rates"):
                check(ablation(tmp_path, [claim], rates="[1e-3]"))
