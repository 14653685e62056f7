"""An ablation's file becomes arms and members, or an error that names file and key."""

import pytest

from jaxdecoder.ablation.grid import read
from jaxdecoder.errors import UserError

BASE = """
[model]
vocab_size = 65
context_length = 8
d_model = 16
n_layers = 2
n_heads = 2

[train]
steps = 100
batch_size = 4
"""


def ablation(tmp_path, text, **options):
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "x.toml").write_text(f'base = "base.toml"\n{text}')
    return read(tmp_path / "x.toml", **options)


class TestArms:
    def test_are_the_full_grid_of_the_factors(self, tmp_path):
        asked = ablation(
            tmp_path, '[factors]\nmodel.norm = ["layernorm", "none"]\nmodel.n_heads = [1, 2]\n'
        )
        assert [arm.name for arm in asked.arms] == [
            "norm=layernorm,n_heads=1",
            "norm=layernorm,n_heads=2",
            "norm=none,n_heads=1",
            "norm=none,n_heads=2",
        ]
        assert asked.factors == {"model.norm": ("layernorm", "none"), "model.n_heads": (1, 2)}

    def test_may_be_listed_and_then_share_the_bases_values(self, tmp_path):
        asked = ablation(
            tmp_path, "[[arms]]\nmodel.n_layers = 4\n[[arms]]\nmodel.residual = false\n"
        )
        assert [dict(arm.values) for arm in asked.arms] == [
            {"model.n_layers": 4, "model.residual": True},
            {"model.n_layers": 2, "model.residual": False},
        ]

    def test_take_lists_as_values(self, tmp_path):
        text = '[factors]\nmodel.attention = ["full", ["full", "sliding_window"]]\n'
        assert [arm.name for arm in ablation(tmp_path, text).arms] == [
            "attention=full",
            "attention=full+sliding_window",
        ]


class TestMembers:
    TEXT = (
        "seeds = 2\nfirst_seed = 3\nlearning_rates = [2e-3, 1e-3]\n"
        "[overrides]\ntrain.log_every = 7\n[factors]\nmodel.n_heads = [1, 2]\n"
    )

    def test_are_every_arm_at_every_rate_with_every_seed(self, tmp_path):
        asked = ablation(tmp_path, self.TEXT, out="somewhere")
        assert len(asked.members) == 8
        assert asked.learning_rates == (1e-3, 2e-3)
        configs = [member.config for member in asked.members]
        found = {(c.model.n_heads, c.optimizer.learning_rate, c.train.seed) for c in configs}
        assert found == {(h, r, s) for h in (1, 2) for r in (1e-3, 2e-3) for s in (3, 4)}
        assert {config.train.log_every for config in configs} == {7}
        assert len({config.train.out for config in configs}) == 8
        assert configs[0].train.out == "somewhere/members/n_heads=1,lr=0.001,seed=3"

    def test_have_equal_steps_tokens_or_flops(self, tmp_path):
        factors = "[factors]\ntrain.batch_size = [4, 8]\n"
        for budget, steps in (("steps", [100, 100]), ("tokens", [100, 50]), ("flops", [100, 50])):
            asked = ablation(tmp_path, f'seeds = 1\nbudget = "{budget}"\n{factors}')
            assert [member.config.train.steps for member in asked.members] == steps

    def test_of_equal_flops_are_longer_where_a_token_costs_less(self, tmp_path):
        asked = ablation(
            tmp_path, 'seeds = 1\nbudget = "flops"\n[factors]\nmodel.feed_forward = [true, false]\n'
        )
        whole, without = (member.config.train.steps for member in asked.members)
        # A token's multiply-adds: layers 2 x 4 x 16^2 of projections, 2 x 8 x 16^2 of
        # feed-forwards, 2 x 2 x 16 x 4.5 of allowed pairs, head 16 x 65.
        rest = 2 * 4 * 256 + 2 * 2 * 16 * 4.5 + 16 * 65
        assert (whole, without) == (100, round(100 * (rest + 2 * 8 * 256) / rest))

    def test_have_their_arms_rate_where_it_is_a_factor(self, tmp_path):
        text = "seeds = 1\n[factors]\noptimizer.learning_rate = [1e-3, 5e-3]\n"
        asked = ablation(tmp_path, text)
        for member, rate in zip(asked.members, (1e-3, 5e-3), strict=True):
            assert member.learning_rate == member.config.optimizer.learning_rate == rate
            assert member.config.train.out.endswith(f"members/{member.name}")
            assert asked.rates(member.arm) == (rate,)

    def test_have_another_size_on_demand(self, tmp_path):
        text = self.TEXT + "[full]\nseeds = 3\noverrides.train.steps = 900\n"
        asked = ablation(tmp_path, text, size="full")
        assert len(asked.members) == 12
        assert {m.config.train.steps for m in asked.members} == {900}
        assert {m.config.train.log_every for m in asked.members} == {7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[factors]\nmodel.nrom = ["none"]', "factors: model.nrom: unknown key; did you mean"),
        ('[factors]\nmodel.norm = ["batch"]', 'factors: model.norm = "batch": should be one of'),
        ('[factors]\nmodel.norm = "none"', "factors.model.norm: must be a list of values"),
        ("[factors]\nn_heads = [1]", "n_heads: name the field in full"),
        ("[factors]\nmodel.n_heads = [2, 2]", "the arm n_heads=2 is there twice"),
        ("[factors]\nmodel.n_heads = [3]", "model.d_model = 16: not divisible"),
        ("seeds = 0\n[factors]\nmodel.n_heads = [1]", "seeds = 0: should be greater than 0"),
        ("sedes = 3\n[factors]\nmodel.n_heads = [1]", "sedes"),
        ("[overrides]\nmodel.d_modell = 4\n[factors]\nmodel.n_heads = [1]", "model.d_modell"),
        ("", "give either [factors]"),
        (
            "learning_rates = [1e-3]\n[factors]\noptimizer.learning_rate = [1e-3]",
            "learning_rates must be left out",
        ),
        (
            "learning_rates = [1e-3, 1e-3]\n[factors]\nmodel.n_heads = [1]",
            "learning_rates = [0.001, 0.001]: one of them is there twice",
        ),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        ablation(tmp_path, text)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_size_that_the_file_lacks_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \[full\] table"):
        ablation(tmp_path, "[factors]\nmodel.n_heads = [1]\n", size="full")


def test_a_size_that_is_no_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="full: must be a table, not 3"):
        ablation(tmp_path, "full = 3\n[factors]\nmodel.n_heads = [1]\n", size="full")
