"""A hundred steps of a small MoE, balance loss on, follow transformers' own, loss by loss, from the same weights.

The fixture was written by tools/compare_training.py. Asked is 1e-4; rounding alone makes 2e-6.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qwen3_jax import Batch, adamw, init_train_state, make_train_step
from qwen3_jax.training.schedule import Phase, schedule
from tests.model.models import QUICK
from tests.parity.build import filled_model
from tests.training import curve

FIXTURE = Path(__file__).parents[1] / "fixtures" / "training" / "losses.npz"
LIMIT = 1e-5


def batch_of(step):
    tokens = curve.tokens(step)
    mask = np.ones(tokens.shape, np.float32)
    mask[:, -1] = 0  # nothing follows a row's last word
    return Batch(tokens=tokens, labels=np.roll(tokens, -1, 1), mask=mask)


def test_a_hundred_losses_are_transformers():
    wanted = np.load(FIXTURE)
    assert wanted["loss"].shape == (curve.STEPS,) and wanted["loss"][-5:].mean() < 0.7 * wanted["loss"][:5].mean()
    assert wanted["margin"].min() > 5e-7  # no expert was chosen by rounding
    rate = schedule([Phase(curve.STEPS, curve.PEAK_RATE, warmup=curve.WARMUP, end=curve.END)])
    for number in (0, 59, 60, 99):
        np.testing.assert_allclose(np.asarray(rate(number)), curve.rate(number), rtol=1e-5)
    model = filled_model(curve.CONFIG, curve.weight)
    optimizer = adamw(rate, **curve.ADAMW)
    state = init_train_state(model, optimizer)
    step = make_train_step(model.config, optimizer, dtype=jnp.float32, remat="none")
    run = step.lower(state, batch_of(0)).compile(compiler_options=QUICK)
    found = dict(loss=[], balance_loss=[], grad_norm=[])
    for number in range(curve.STEPS):
        state, metrics = run(state, None, batch_of(number))
        for name, values in found.items():
            values.append(float(metrics[name]))
    np.testing.assert_allclose(found["balance_loss"], wanted["balance"], rtol=0, atol=LIMIT)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=0, atol=LIMIT)
    np.testing.assert_allclose(found["grad_norm"], wanted["norm"], rtol=1e-4)
