"""Whether each replica differentiates its share of the loss of a compiled model, as the sum of gradients asks."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from mpscale.core.reason import Code, Reason
from mpscale.worker import model as models
from mpscale.worker.compiled.update import FitUpdate
from mpscale.worker.draws import draws_of
from mpscale.worker.replicas import ReplicatedStep, of_one, on_replicas, restored

_ALIKE, _ALIKE_IF_DRAWN = 0.01, 0.3
"""How far two losses of a batch may differ: by rounding, or because they draw random numbers that differ, too."""
_CURE = (
    "let a loss of your own return one number per example, which Keras averages and divides; in a train_step or "
    "compute_loss divide by self.distribute_strategy.num_replicas_in_sync"
)


def remarks(step: ReplicatedStep, update: FitUpdate, parts: tuple[Any, Any, Any]) -> list[str]:
    """What the loss does otherwise than on one device with the whole batch, a phrase each.

    Keras adds up the gradients of replicas, and divides what its own losses average. Where it is not known to have
    done so, the loss is computed twice: with the true number of replicas, and as if there was one.

    Args:
        step: has been traced.
        update: its own.
        parts: examples, labels and weights of a replica's batch; None for no such.
    """
    strategy = step.strategy
    replicas, found = strategy.num_replicas_in_sync, []
    if replicas == 1:
        return []
    if any(_leaves_out(each) for each in update.compared):
        found.append("the loss of a batch is not the mean of those of its parts: masks or weights count examples")
    own = [name for name in ("train_step", "compute_loss") if models.overrides(update.model, name)]
    if not own and not update.undivided:
        return found
    batch = keras.utils.pack_x_y_sample_weight(*parts)
    why = "it is 0 or not finite"
    try:
        share, is_exact = _share(update, batch, strategy)
    except Exception as error:  # from the user's code
        share, is_exact, why = np.nan, False, type(error).__name__
    # A model may have layers that wait for other replicas, so all workers have to compute it equally often.
    share = step.agreed(share)
    if not np.isfinite(share):
        return [*found, f"whether the loss is divided by the number of replicas is unknown ({why})"]
    if abs(share * replicas - 1) <= (_ALIKE if is_exact else _ALIKE_IF_DRAWN):
        return found
    if _adds_up(update, batch, strategy):
        return found
    part = "" if share > 1 - _ALIKE_IF_DRAWN else "a part of "
    found.append(
        f"{part}the loss is not divided by the number of replicas, so its gradients are {replicas} times those of one "
        f"device with the whole batch, as in Keras' fit, and so is the loss in this row: {_CURE}"
    )
    return found


def _leaves_out(compared: Any) -> bool:
    reduction = getattr(compared.loss, "reduction", None)
    return getattr(compared.outputs, "_keras_mask", None) is not None or reduction == "mean_with_sample_weight"


def _share(update: FitUpdate, batch: Any, strategy: tf.distribute.Strategy) -> tuple[float, bool]:
    """The loss of a batch on a replica, over that on one device; and whether all random numbers were the same.

    Of several losses it is the one that is furthest from an equal share.
    """
    of_replica, draws_alike = _losses(update, batch, strategy)
    with of_one(strategy):
        of_device, _ = _losses(update, batch, strategy)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(of_replica / of_device)), draws_alike


def _adds_up(update: FitUpdate, batch: Any, strategy: tf.distribute.Strategy) -> bool:
    """Whether twice the examples have twice the loss, so that replicas have their shares as it is."""
    double = tf.nest.map_structure(lambda part: None if part is None else tf.concat([part, part], 0), batch)
    try:
        with of_one(strategy):
            (once, _), (twice, _) = (_losses(update, each, strategy) for each in (batch, double))
    except Exception:  # from the user's code, which may be made for one size of batch
        return False
    return bool((twice > 1.5 * once).all())


def _losses(update: FitUpdate, batch: Any, strategy: tf.distribute.Strategy) -> tuple[Any, bool]:
    """The losses of a batch on the first replica, (losses,); and whether they draw what they would draw again."""

    def losses(given: Any) -> Any:
        return strategy.run(lambda: update.losses_of(given))

    given = tf.nest.map_structure(lambda part: None if part is None else tf.convert_to_tensor(part), batch)
    with strategy.scope():
        traced = tf.function(losses, autograph=False).get_concrete_function(given)
    trained = {id(each) for variable in update.model.trainable_variables for each in on_replicas(variable.value)}
    with restored([each for each in traced.graph.variables if id(each) not in trained]):
        found = traced(given)
    draws = draws_of(traced.graph, jit=False)
    again = not (isinstance(draws, Reason) and draws.code == Code.NOT_COMPARABLE)
    return np.array([float(strategy.experimental_local_results(each)[0]) for each in found]), again
