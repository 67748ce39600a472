"""What TensorFlow's rewrite to float16 makes of the train step, for a GPU that is only described to it.

The rewrite is a pass over a graph, so it runs without a device exactly as it does on a GPU.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2, rewriter_config_pb2
from tensorflow.core.protobuf.device_properties_pb2 import NamedDevice
from tensorflow.python.grappler import cluster, tf_optimizer

from mpscale.core.case import Settings
from mpscale.core.mode import MODES
from mpscale.scaling.skip import all_nodes
from mpscale.worker.batches import Batches
from mpscale.worker.scaler import scaler_for
from mpscale.worker.step import TrainStep
from mpscale.worker.training import batches
from mpscale.worker.update import Update
from mpscale.workloads.workload import sparse_cross_entropy

GPU = "/job:localhost/replica:0/task:0/device:GPU:0"
MODEL = {"MatMul", "BiasAdd", "Tanh", "TanhGrad", "BiasAddGrad", "GatherV2", "Reshape"}
"""The operations of the model, forward and backward; GatherV2 fetches its examples.

TensorFlow moves a Reshape of the finite check before the cast of a gradient to float32, which changes no value.
"""


def graph_of_a_step(scaler, steps_per_call):
    """A train step without XLA and with two layers that the rewrite knows, or a loop of steps, placed on the GPU."""
    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((2,)), *layers])
    x, y, order = np.zeros((20, 2), np.float32), np.zeros(20, np.int64), batches(20, 5, 8, seed=0)
    step = TrainStep(Update(model, scaler, sparse_cross_entropy), Batches((x, y), order), False, steps_per_call)
    step.trace()
    graph = (step._function if steps_per_call == 1 else step._several).get_concrete_function().graph.as_graph_def()
    for node in all_nodes(graph):
        node.device = GPU
    return graph


def rewritten(graph):
    """The graph after all of TensorFlow's optimisations, including the rewrite to float16."""
    device = NamedDevice(name=GPU)
    device.properties.type = "GPU"
    device.properties.environment.update({"architecture": "8.0", "cuda": "12080", "cudnn": "9000"})
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.auto_mixed_precision = rewriter_config_pb2.RewriterConfig.ON
    options.min_graph_nodes = -1
    with tf.Graph().as_default() as whole:
        tf.graph_util.import_graph_def(graph, name="")
        described = tf.compat.v1.train.export_meta_graph(graph_def=whole.as_graph_def(), graph=whole)
    # Operations that change variables must not be optimised away.
    effects = [node.name for node in graph.node if any(x in node.op for x in ("Assign", "Scatter", "If", "While"))]
    described.collection_def["train_op"].CopyFrom(
        meta_graph_pb2.CollectionDef(node_list=meta_graph_pb2.CollectionDef.NodeList(value=effects))
    )
    return tf_optimizer.OptimizeGraph(config, described, cluster=cluster.Cluster(devices=[device]))


def half_operations(steps_per_call=1):
    """The operations of a step of the mode that compute in float16 once it has been rewritten."""
    scaler = scaler_for(MODES["graph-rewrite"], keras.optimizers.SGD(0.1), Settings())
    graph = rewritten(graph_of_a_step(scaler, steps_per_call))
    half = tf.float16.as_datatype_enum
    low = [node for node in all_nodes(graph) if half in (node.attr["T"].type, node.attr["Tparams"].type)]
    # A loop passes the examples on.
    return {node.op for node in low} - {"Cast", "Enter", "Merge", "Switch", "NextIteration", "Exit"}


@pytest.fixture
def rewrite_is_on():
    """As set_arithmetic switches it on."""
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": True})
    yield
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision": False})


@pytest.mark.usefixtures("rewrite_is_on")
@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_model_is_rewritten_and_neither_unscaling_nor_the_finite_check_is(steps_per_call):
    assert {"MatMul", "BiasAddGrad"} <= half_operations(steps_per_call) <= MODEL


def test_without_the_shield_the_rewrite_reaches_them():
    """The shield is needed, and the test above would notice if it failed."""
    assert not half_operations() <= MODEL


@pytest.mark.usefixtures("rewrite_is_on")
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("jit", [True, False])
def test_shield_lets_every_kind_of_gradient_through_unchanged(jit):
    scaler = scaler_for(MODES["graph-rewrite"], keras.optimizers.SGD(1.0), Settings(dynamic_scale={"initial": 4.0}))
    dense, sparse, unused = (keras.Variable([1.0, 2.0, 3.0]) for _ in range(3))
    scaler.optimizer.build([dense, sparse, unused])

    @tf.function(jit_compile=jit)
    def step(value):
        slices = tf.IndexedSlices(tf.reshape(value, (1,)), tf.constant([1]), tf.constant([3]))
        return scaler.apply([tf.fill((3,), value), slices, None], [dense, sparse, unused], None).overflow

    assert step(tf.constant(2.0)).numpy() == 0.0
    assert step(tf.constant(float("inf"))).numpy() == 1.0
    assert dense.numpy().tolist() == [0.5, 1.5, 2.5]
    assert sparse.numpy().tolist() == [1.0, 1.5, 3.0]
    assert unused.numpy().tolist() == [1.0, 2.0, 3.0]
