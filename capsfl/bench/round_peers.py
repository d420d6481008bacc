"""The round of `capsfl bench rounds` in other frameworks, in a Python of its own; nothing of this project is imported.

    python round_peers.py torch|pfl|fedjax|flower THREADS

It prints one line of JSON with the framework's version and the check loss, then answers every line on standard input
with a round's seconds, wall and process CPU. Each framework works as its own documentation has it done: torch loops
over hospitals and steps, pfl runs its simulated backend, FedJAX its `for_each_client`, Flower its Ray simulation with
the strategy for differential privacy at the server.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np

HOSPITALS, RECORDS, BATCH = 100, 64, 16
RATE, CLIP_NORM, NOISE_MULTIPLIER = 0.01, 0.5, 1.0
CHECKED_ROUNDS = 3


def draw_records():
    """Images `(hospitals, records, 28, 28, 1)` of ten templates in noise, and their classes."""
    generator = np.random.default_rng(0)
    templates = generator.standard_normal((10, 28, 28, 1)).astype(np.float32)
    labels = generator.integers(0, 10, (HOSPITALS, RECORDS)).astype(np.int32)
    noise = generator.standard_normal((HOSPITALS, RECORDS, 28, 28, 1))
    return (0.3 * (0.5 * templates[labels] + noise)).astype(np.float32), labels


def draw_kernels():
    """He-normal kernels of both convolutions `(3, 3, in, out)` and both dense layers `(in, out)`; biases are zero."""
    generator = np.random.default_rng(1)
    shapes = ((3, 3, 1, 16), (3, 3, 16, 32), (1568, 16), (16, 10))
    return [(generator.standard_normal(s) * np.sqrt(2 / np.prod(s[:-1]))).astype(np.float32) for s in shapes]


def torch_parts(threads):
    """The network, its records in torch's layout, and the loss over all of them."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(threads)
    functional = torch.nn.functional

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                [
                    torch.nn.Conv2d(1, 16, 3, padding=1),
                    torch.nn.Conv2d(16, 32, 3, padding=1),
                    torch.nn.Linear(1568, 16),
                    torch.nn.Linear(16, 10),
                ]
            )
            with torch.no_grad():
                for layer, kernel in zip(self.layers, draw_kernels(), strict=True):
                    order = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
                    layer.weight.copy_(torch.from_numpy(kernel.transpose(order).copy()))
                    layer.bias.zero_()

        def forward(self, images):
            for layer in self.layers[:2]:
                images = functional.max_pool2d(functional.relu(layer(images)), 2)
            hidden = functional.relu(self.layers[2](images.permute(0, 2, 3, 1).flatten(1)))
            return self.layers[3](hidden)

    images, labels = draw_records()
    images = torch.from_numpy(images.transpose(0, 1, 4, 2, 3).copy())
    labels = torch.from_numpy(labels).long()

    def whole_loss(network):
        with torch.no_grad():
            return float(functional.cross_entropy(network(images.flatten(0, 1)), labels.flatten()))

    return torch, Network, images, labels, whole_loss


class Torch:
    """Plain torch: a loop over hospitals and steps."""

    def __init__(self, threads):
        self.torch, network, self.images, self.labels, self.whole_loss = torch_parts(threads)
        self.network = network()
        self.order = np.random.default_rng(2)
        self.version = self.torch.__version__

    def run(self, noise_multiplier):
        torch = self.torch
        weights = [p.detach().clone() for p in self.network.parameters()]
        total = [torch.zeros_like(w) for w in weights]
        for hospital in self.order.permutation(HOSPITALS):
            with torch.no_grad():
                for parameter, weight in zip(self.network.parameters(), weights, strict=True):
                    parameter.copy_(weight)
            optimizer = torch.optim.SGD(self.network.parameters(), RATE)
            for start in range(0, RECORDS, BATCH):
                rows = slice(start, start + BATCH)
                optimizer.zero_grad()
                logits = self.network(self.images[hospital, rows])
                torch.nn.functional.cross_entropy(logits, self.labels[hospital, rows]).backward()
                optimizer.step()
            update = [p.detach() - w for p, w in zip(self.network.parameters(), weights, strict=True)]
            norm = torch.sqrt(sum((leaf * leaf).sum() for leaf in update))
            share = torch.clamp(CLIP_NORM / norm, max=1.0)
            for leaf, part in zip(total, update, strict=True):
                leaf += share * part
        with torch.no_grad():
            for parameter, weight, leaf in zip(self.network.parameters(), weights, total, strict=True):
                noise = noise_multiplier * CLIP_NORM * torch.randn_like(leaf)
                parameter.copy_(weight + (leaf + noise) / HOSPITALS)

    def loss(self):
        return self.whole_loss(self.network)


class Pfl:
    """pfl-research: its simulated backend in torch, its central Gaussian mechanism."""

    def __init__(self, threads):
        from importlib.metadata import version

        torch, network, images, labels, self.whole_loss = torch_parts(threads)
        from pfl.aggregate.simulate import SimulatedBackend  # pyright: ignore[reportMissingImports]
        from pfl.algorithm.base import NNAlgorithmParams  # pyright: ignore[reportMissingImports]
        from pfl.algorithm.federated_averaging import FederatedAveraging  # pyright: ignore[reportMissingImports]
        from pfl.data.dataset import Dataset  # pyright: ignore[reportMissingImports]
        from pfl.data.federated_dataset import FederatedDataset  # pyright: ignore[reportMissingImports]
        from pfl.data.sampling import get_user_sampler  # pyright: ignore[reportMissingImports]
        from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams  # pyright: ignore[reportMissingImports]
        from pfl.metrics import Weighted  # pyright: ignore[reportMissingImports]
        from pfl.model.pytorch import PyTorchModel  # pyright: ignore[reportMissingImports]
        from pfl.privacy.gaussian_mechanism import GaussianMechanism  # pyright: ignore[reportMissingImports]
        from pfl.privacy.privacy_mechanism import (  # pyright: ignore[reportMissingImports]
            CentrallyAppliedPrivacyMechanism,
        )

        class Network(network):
            def loss(self, images, labels, is_eval=False):
                return torch.nn.functional.cross_entropy(self(images), labels)

            def metrics(self, images, labels, is_eval=False):
                return {"loss": Weighted(0.0, len(labels))}

        self.version = version("pfl")
        self.network = Network()
        sampler = get_user_sampler("minimize_reuse", list(range(HOSPITALS)))
        records = FederatedDataset(lambda user: Dataset([images[user], labels[user]], user_id=str(user)), sampler)

        def run(noise_multiplier):
            model = PyTorchModel(
                self.network,
                local_optimizer_create=torch.optim.SGD,
                central_optimizer=torch.optim.SGD(self.network.parameters(), 1.0),
            )
            mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(CLIP_NORM, max(noise_multiplier, 1e-12)))
            FederatedAveraging().run(
                algorithm_params=NNAlgorithmParams(
                    central_num_iterations=1,
                    evaluation_frequency=10**9,
                    train_cohort_size=HOSPITALS,
                    val_cohort_size=0,
                ),
                backend=SimulatedBackend(training_data=records, val_data=records, postprocessors=[mechanism]),
                model=model,
                model_train_params=NNTrainHyperParams(
                    local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH
                ),
                model_eval_params=NNEvalHyperParams(local_batch_size=BATCH),
                callbacks=[],
            )

        self.run = run

    def loss(self):
        return self.whole_loss(self.network)


class FedJax:
    """FedJAX: `for_each_client` with its own jit backend, clipping and noise by its tree functions."""

    def __init__(self, threads):
        from importlib.metadata import version

        import fedjax  # pyright: ignore[reportMissingImports]
        import jax
        import jax.numpy as jnp
        from fedjax.algorithms.fed_avg import (  # pyright: ignore[reportMissingImports]
            create_train_for_each_client,
        )
        from fedjax.core import for_each_client, tree_util  # pyright: ignore[reportMissingImports]

        for_each_client.set_for_each_client_backend("jit")
        self.version = f"{version('fedjax')}, jax {jax.__version__}"
        images, labels = draw_records()
        kernels = draw_kernels()
        self.weights: Any = [(jnp.asarray(kernel), jnp.zeros(kernel.shape[-1])) for kernel in kernels]

        def loss(weights, images, labels):
            found = images
            for kernel, bias in weights[:2]:
                found = jax.lax.conv_general_dilated(
                    found, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                window = (1, 2, 2, 1)
                found = jax.nn.relu(found + bias)
                found = jax.lax.reduce_window(found, -jnp.inf, jax.lax.max, window, window, "VALID")
            (kernel, bias), (last, last_bias) = weights[2:]
            hidden = jax.nn.relu(found.reshape(len(found), -1) @ kernel + bias)
            logs = jax.nn.log_softmax(hidden @ last + last_bias)
            return -jnp.take_along_axis(logs, labels[:, None], 1).mean()

        data = fedjax.InMemoryFederatedData({str(h): {"x": images[h], "y": labels[h]} for h in range(HOSPITALS)})
        gradient = jax.jit(lambda weights, batch, rng: jax.grad(loss)(weights, batch["x"], batch["y"]))
        train = create_train_for_each_client(gradient, fedjax.optimizers.sgd(RATE))
        batches = fedjax.ShuffleRepeatBatchHParams(batch_size=BATCH, num_epochs=1, skip_shuffle=True)

        @jax.jit
        def step(weights, total, key, noise_multiplier):
            leaves, structure = jax.tree.flatten(total)
            keys = jax.random.split(key, len(leaves))
            deviation = noise_multiplier * CLIP_NORM
            noisy = [a + deviation * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
            # FedJAX's updates point from the trained weights to the server's.
            return jax.tree.map(lambda w, a: w - a / HOSPITALS, weights, jax.tree.unflatten(structure, noisy))

        order = np.random.default_rng(2)

        def run(noise_multiplier):
            key = jax.random.key(time.monotonic_ns() % 2**31)
            clients = [
                (str(h), data.get_client(str(h)).shuffle_repeat_batch(batches), jax.random.fold_in(key, int(h)))
                for h in order.permutation(HOSPITALS)
            ]
            total = tree_util.tree_zeros_like(self.weights)
            for _, update in train(self.weights, clients):
                total = tree_util.tree_add(total, tree_util.tree_clip_by_global_norm(update, CLIP_NORM))
            self.weights = jax.block_until_ready(step(self.weights, total, key, noise_multiplier))

        self.run = run
        self.loss = lambda: float(loss(self.weights, images.reshape(-1, 28, 28, 1), labels.reshape(-1)))


class Flower:
    """Flower: Ray simulation, one core a hospital; rounds of one simulation, since its start takes many seconds."""

    def __init__(self, threads):
        os.environ.update(FLWR_TELEMETRY_ENABLED="0", RAY_USAGE_STATS_ENABLED="0")
        os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))  # Ray's workers import this file
        from importlib.metadata import version

        self.version = version("flwr")
        _, self.network_type, _, _, self.whole_loss = torch_parts(1)
        self.final = None
        self.waiting: list[float] = []

    def simulate(self, rounds, noise_multiplier):
        import round_peers  # pyright: ignore[reportMissingImports]
        from flwr.client import ClientApp  # pyright: ignore[reportMissingImports]
        from flwr.common import ndarrays_to_parameters  # pyright: ignore[reportMissingImports]
        from flwr.server import ServerApp, ServerAppComponents, ServerConfig  # pyright: ignore[reportMissingImports]
        from flwr.server.strategy import (  # pyright: ignore[reportMissingImports]
            DifferentialPrivacyServerSideFixedClipping,
            FedAvg,
        )
        from flwr.simulation import run_simulation  # pyright: ignore[reportMissingImports]

        ends = []

        def finished(number, weights, config):
            ends.append(time.perf_counter())
            self.final = weights
            return 0.0, {}

        def server(context):
            start = [p.detach().numpy().copy() for p in self.network_type().parameters()]
            average = FedAvg(
                fraction_fit=1.0,
                fraction_evaluate=0.0,
                min_fit_clients=HOSPITALS,
                min_available_clients=HOSPITALS,
                evaluate_fn=finished,
                initial_parameters=ndarrays_to_parameters(start),
            )
            private = DifferentialPrivacyServerSideFixedClipping(
                average, noise_multiplier=noise_multiplier, clipping_norm=CLIP_NORM, num_sampled_clients=HOSPITALS
            )
            return ServerAppComponents(strategy=private, config=ServerConfig(num_rounds=rounds))

        run_simulation(
            server_app=ServerApp(server_fn=server),
            client_app=ClientApp(client_fn=round_peers.flower_client),
            num_supernodes=HOSPITALS,
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0}},
        )
        return list(np.diff(ends))

    def run(self, noise_multiplier):
        """One round of a simulation that was run when the last one had no more; its first round is not counted."""
        if not self.waiting:
            self.waiting = self.simulate(4, noise_multiplier)[1:]
        return self.waiting.pop()

    def loss(self):
        import torch  # pyright: ignore[reportMissingImports]

        network = self.network_type()
        with torch.no_grad():
            for parameter, weight in zip(network.parameters(), self.final or [], strict=True):
                parameter.copy_(torch.from_numpy(np.asarray(weight)))
        return self.whole_loss(network)


_WORKER: dict[str, Any] = {}


def flower_client(context):
    """One hospital in a Ray worker, which keeps network and records from call to call."""
    from flwr.client import NumPyClient  # pyright: ignore[reportMissingImports]

    if not _WORKER:
        torch, network, images, labels, _ = torch_parts(1)
        _WORKER.update(torch=torch, network=network(), images=images, labels=labels)
    torch, network = _WORKER["torch"], _WORKER["network"]
    hospital = int(context.node_config["partition-id"])

    class Client(NumPyClient):
        def fit(self, parameters, config):
            with torch.no_grad():
                for parameter, weight in zip(network.parameters(), parameters, strict=True):
                    parameter.copy_(torch.from_numpy(weight))
            optimizer = torch.optim.SGD(network.parameters(), RATE)
            for start in range(0, RECORDS, BATCH):
                rows = slice(start, start + BATCH)
                optimizer.zero_grad()
                logits = network(_WORKER["images"][hospital, rows])
                torch.nn.functional.cross_entropy(logits, _WORKER["labels"][hospital, rows]).backward()
                optimizer.step()
            return [p.detach().numpy().copy() for p in network.parameters()], RECORDS, {}

    return Client().to_client()


PEERS = {"torch": Torch, "pfl": Pfl, "fedjax": FedJax, "flower": Flower}


def main():
    """Says the version and the check loss, then runs a round for every line of input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a framework prints must not be read as an answer
    peer = PEERS[sys.argv[1]](int(sys.argv[2]))
    if sys.argv[1] == "flower":
        peer.simulate(CHECKED_ROUNDS, 0.0)
    else:
        for _ in range(CHECKED_ROUNDS):
            peer.run(0.0)
    print(json.dumps({"version": peer.version, "check_loss": peer.loss()}), file=answers, flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        told = peer.run(NOISE_MULTIPLIER)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if sys.argv[1] == "flower":
            # Its hospitals compute in processes of Ray, whose time is not this one's.
            wall, cpu = float(told), None
        print(json.dumps({"wall_s": wall, "cpu_s": cpu}), file=answers, flush=True)


if __name__ == "__main__":
    main()
