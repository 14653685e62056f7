"""Claims find what is planted, miss what is not, and refuse what the arms cannot answer."""

import numpy as np
import pytest

from jaxdecoder.ablation import statistics
from jaxdecoder.ablation.claims import check, judge
from jaxdecoder.ablation.evidence import Evidence, Outcome, knowing_nothing
from jaxdecoder.ablation.grid import METRICS, read
from jaxdecoder.ablation.report import sentence
from jaxdecoder.errors import UserError

NANO = """
[model]
context_length = 8
d_model = 16
n_layers = 2
n_heads = 2
"""


def ablation(
    tmp_path,
    claims,
    *,
    seeds=5,
    rates="[1e-3, 2e-3, 4e-3]",
    factors=None,
    metric="validation_loss",
):
    """An ablation with these claims over two norms and three head counts."""
    (tmp_path / "base.toml").write_text(NANO)
    factors = factors or 'model.norm = ["layernorm", "none"]\nmodel.n_heads = [1, 2, 4]'
    listed = ", ".join(f"'{claim}'" for claim in claims)
    (tmp_path / "x.toml").write_text(
        f'base = "base.toml"\nseeds = {seeds}\nlearning_rates = {rates}\nmetric = "{metric}"\n'
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


@pytest.mark.parametrize(
    ("reports", "most"),
    # At most 2 and 10 are expected; so many more would be seen once in a hundred such tests.
    [(40, 6), pytest.param(200, 18, marks=pytest.mark.slow)],
)
def test_a_planted_null_is_found_no_more_often_than_the_level_says(
    tmp_path, monkeypatch, reports, most
):
    """Reports of four claims each about arms that differ in nothing."""
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
    for seed in range(reports):
        found = judge(asked, outcomes(asked, lambda norm, heads, rate: 0.0, seed=seed))
        wrong += any(verdict.verdict != "undecided" for verdict in found)
    assert wrong <= most


def test_two_arms_are_a_pair_whatever_else_differs(tmp_path):
    asked = ablation(
        tmp_path,
        ["norm=layernorm beats norm=none"],
        factors='[[arms]]\nmodel.norm = "layernorm"\nmodel.n_heads = 1\n'
        '[[arms]]\nmodel.norm = "none"\nmodel.n_heads = 4\n',
    )
    (verdict,) = judge(asked, outcomes(asked, lambda norm, heads, rate: 0.1 * (norm == "none")))
    assert verdict.verdict == "supported"


class TestLearningRateGrids:
    def test_that_are_too_narrow_support_no_best_rate(self, tmp_path):
        """Both are best beyond one end, four doublings apart, and the grid does not show it."""

        def loss(norm, heads, rate):
            return bowl(8e-3 if norm == "none" else 1.28e-1, 0.01)(rate)

        asked = ablation(tmp_path, ["the best learning rate does not depend on norm"])
        (verdict,) = judge(asked, outcomes(asked, loss, noise=0.001))
        assert verdict.verdict == "undecided"
        assert "end of the grid" in sentence(verdict)

    def test_leave_open_what_moves_by_less_than_a_step_but_not_surely(self, tmp_path):
        """The best rate moves by 0.7 of one, and that may be a whole one where seeds differ."""

        def loss(norm, heads, rate):
            return bowl(2e-3 * 2 ** (0.35 if norm == "none" else -0.35))(rate)

        claim = "the best learning rate does not depend on norm"
        assert verdicts(tmp_path, [claim], loss, noise=0.001) == ["supported"]
        assert verdicts(tmp_path, [claim], loss, noise=0.05) == ["undecided"]

    def test_are_told_of_where_an_arm_is_best_at_their_end(self, tmp_path):
        claim = "norm=layernorm,n_heads=1 beats norm=none,n_heads=1"
        asked = ablation(tmp_path, [claim])

        def caveat(centre):
            def loss(norm, heads, rate):
                return 0.1 * (norm == "none") + bowl(centre if norm == "none" else 2e-3)(rate)

            (verdict,) = judge(asked, outcomes(asked, loss))
            assert verdict.verdict == "supported"
            assert verdict.judgement.caveat in sentence(verdict)
            return verdict.judgement.caveat

        assert caveat(2e-3) == ""
        assert caveat(8e-3).endswith("end of the grid for norm=none,n_heads=1.")

    def test_may_be_a_factor(self, tmp_path):
        factors = "optimizer.learning_rate = [1e-3, 4e-3]"
        claim = "learning_rate=0.001 beats learning_rate=0.004"
        asked = ablation(tmp_path, [claim], rates="[]", factors=factors)
        found = outcomes(asked, lambda norm, heads, rate: bowl(1e-3)(rate))
        (verdict,) = judge(asked, found)
        assert verdict.verdict == "supported"
        evidence = Evidence(asked, found)
        assert [evidence.best_rate(arm) for arm in asked.arms] == [1e-3, 4e-3]
        assert not any(evidence.at_end(arm) for arm in asked.arms)


class TestDivergence:
    @staticmethod
    def some_diverged(asked, found, which):
        """What the outcomes are if these members diverged."""
        nothing = knowing_nothing(65)
        return [
            o._replace(metrics=nothing, diverged_at=3) if which(m.arm.value("model.norm"), m) else o
            for o, m in zip(found, asked.members, strict=True)
        ]

    def judged(self, tmp_path, claim, which, metric="validation_loss"):
        asked = ablation(tmp_path, [claim], metric=metric)
        found = outcomes(asked, handicapped)
        return judge(asked, self.some_diverged(asked, found, which))[0]

    def test_is_not_the_least_overfitting(self, tmp_path):
        claim = "norm=none beats norm=layernorm"
        verdict = self.judged(tmp_path, claim, lambda norm, m: norm == "none", "overfitting")
        assert verdict.verdict == "undecided"
        assert "diverged" in sentence(verdict)
        claim = "raising n_heads lowers overfitting"
        assert self.judged(tmp_path, claim, lambda norm, m: norm == "none").verdict == "undecided"
        claim = "the effect of norm does not depend on n_heads"
        verdict = self.judged(tmp_path, claim, lambda norm, m: norm == "none", "overfitting")
        assert verdict.verdict == "undecided"

    def test_of_one_seed_makes_a_rate_not_the_best(self, tmp_path):
        asked = ablation(tmp_path, [], metric="overfitting")
        # All are lowest at 2e-3.
        which = lambda norm, m: (m.learning_rate, m.seed) == (2e-3, 1)  # noqa: E731
        found = self.some_diverged(asked, outcomes(asked, handicapped), which)
        evidence = Evidence(asked, found)
        assert all(evidence.best_rate(arm) != 2e-3 for arm in asked.arms)

    def test_of_both_sides_tells_nothing(self, tmp_path):
        for claim in ("norm=none beats norm=layernorm by 0.1", "norm=none beats norm=layernorm"):
            assert self.judged(tmp_path, claim, lambda norm, m: True).verdict == "undecided"

    def test_of_one_side_is_what_it_loses_by(self, tmp_path):
        claim = "norm=layernorm beats norm=none by 1"
        verdict = self.judged(tmp_path, claim, lambda norm, m: norm == "none")
        assert verdict.verdict == "supported"


def test_what_would_be_seen_is_said_at_the_level_of_so_many_claims(tmp_path):
    claims = ["norm=layernorm beats norm=none", "n_heads=4 beats n_heads=1"]
    found = {}
    for asked in (ablation(tmp_path, claims[:1]), ablation(tmp_path, claims * 3)):
        estimate = judge(asked, outcomes(asked, handicapped))[0].judgement.estimate
        found[len(asked.spec.claims)] = estimate.detectable
        deviation = estimate.mean / estimate.effect_size
        level = 0.05 / len(asked.spec.claims)
        assert estimate.detectable == statistics.detectable(deviation, 5, alpha=level)
    assert found[6] > 1.5 * found[1]


TABLES = {
    "norm=layernorm,n_heads=4 beats norm=none,n_heads=1 by 0.05": """
form = "beats"
better = { norm = "layernorm", n_heads = 4 }
worse = { "model.norm" = "none", n_heads = 1 }
by = 0.05
""",
    "norm=none does not beat norm=layernorm": """
form = "beats"
better.norm = "none"
worse.norm = "layernorm"
negated = true
""",
    "widening n_heads narrows the learning-rate sensitivity": """
form = "trend"
factor = "n_heads"
direction = "lowers"
measure = "learning-rate sensitivity"
""",
    "the effect of norm does not depend on the learning rate": """
form = "same_effect"
factor = "norm"
other = "learning rate"
""",
    "the best learning rate does not depend on norm": """
form = "same_best_rate"
factor = "norm"
""",
}


class TestTables:
    """Claims may be tables of the file, which say what sentences say."""

    @staticmethod
    def asked(tmp_path, *tables):
        ablation(tmp_path, [])
        file = tmp_path / "x.toml"
        text = file.read_text().replace("claims = []\n", "")
        file.write_text(text + "".join(f"[[claims]]\n{table}" for table in tables))
        return read(file)

    def test_say_what_their_sentences_say(self, tmp_path):
        asked = self.asked(tmp_path, *TABLES.values())
        found = outcomes(asked, handicapped)
        said = judge(ablation(tmp_path, list(TABLES)), found)
        for table, sentence_, words in zip(judge(asked, found), said, TABLES, strict=True):
            assert sentence_.claim == words
            assert table.verdict == sentence_.verdict
            assert table.adjusted_p == sentence_.adjusted_p
            assert table.judgement.estimate == sentence_.judgement.estimate
            # What a table is called in a report is a sentence that says the same again.
            again = judge(ablation(tmp_path, [table.claim]), found)[0]
            assert again.judgement.estimate.mean == table.judgement.estimate.mean

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ('form = "loses"', 'claims.0 = {"form": "loses"}: should be a sentence, or a table'),
            (
                'form = "trend"\nfactor = "norm"\ndirection = "up"\nmeasure = "x"',
                'claims.0.direction = "up": should be one of lowers, raises',
            ),
            ('form = "beats"\nbetter = { norm = "none" }', "claims.0.worse: is missing"),
            (
                'form = "same_best_rate"\nfactor = "norm"\nfactors = "norm"',
                'claims.0.factors = "norm": unknown key',
            ),
        ],
    )
    def test_that_cannot_be_are_refused_with_file_and_key(self, tmp_path, table, message):
        with pytest.raises(UserError) as error:
            self.asked(tmp_path, table)
        assert f"x.toml: {message}" in str(error.value)


class TestRefusals:
    def test_of_arms_that_have_no_pair_at_some_value(self, tmp_path):
        listed = [("layernorm", 1), ("none", 1), ("none", 2)]
        factors = "".join(
            f'[[arms]]\nmodel.norm = "{norm}"\nmodel.n_heads = {n}\n' for norm, n in listed
        )
        claim = "the effect of norm does not depend on n_heads"
        with pytest.raises(UserError, match=r"at model\.n_heads=2 no two arms differ"):
            check(ablation(tmp_path, [claim], factors=factors))

    @pytest.mark.parametrize(
        ("claim", "message"),
        [
            ("norm=batchnorm beats norm=none", "no arm has norm=batchnorm; there are layernorm"),
            ("activation=relu beats norm=none", "activation is no factor here; there are"),
            ("norm=none is nice", "no known form; there are: A"),
            ("norm=none beats norm=layernorm by 0.1.2", "no arm has norm=layernorm by 0.1.2"),
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
