"""Fully connected capsules in torch, run by a Python of its own; `capsfl.bench.torch_peer` speaks to it.

Requests and answers are one JSON object a line on standard input and output. It imports nothing of this
project, so that interpreter needs torch and numpy alone.
"""

import json
import os
import sys
import threading
import time

import numpy as np
import torch  # pyright: ignore[reportMissingImports]


def squash(s):
    """Equation 1 of Sabour et al. 2017."""
    squared = (s * s).sum(-1, keepdim=True)
    return squared / (1 + squared) * torch.rsqrt(squared + 1e-7) * s


def route(inputs, weights, num_iters):
    """Routes (B, N, D) through (N, M, K, D) to (B, M, K) with stored votes; equal couplings at first."""
    votes = torch.einsum("bnd,nmkd->bnmk", inputs, weights)
    output = squash(votes.sum(1) / votes.shape[2])
    logits = None
    for _ in range(1, num_iters):
        agreement = torch.einsum("bnmk,bmk->bnm", votes, output)
        logits = agreement if logits is None else logits + agreement
        output = squash(torch.einsum("bnm,bnmk->bmk", torch.softmax(logits, dim=-1), votes))
    return output


class Routing:
    """One case, eager or compiled, forward or with its gradients."""

    def __init__(self, request):
        self.device = request["device"]
        with np.load(request["arrays"]) as arrays:
            self.inputs, self.weights = (torch.from_numpy(arrays[name]).to(self.device) for name in ("u", "w"))
        self.num_iters, self.gradient = request["num_iters"], request["gradient"]
        if self.gradient:
            self.inputs.requires_grad_()
            self.weights.requires_grad_()
        if request["compiled"]:
            torch._dynamo.reset()  # else it would turn to dynamic shapes after the first few cases
        self.route = torch.compile(route, dynamic=False) if request["compiled"] else route

    def run(self):
        """The output, or the gradients of its sum of squares."""
        if self.gradient:
            self.inputs.grad = self.weights.grad = None
            (self.route(self.inputs, self.weights, self.num_iters) ** 2).sum().backward()
            results = [self.inputs.grad, self.weights.grad]
        else:
            with torch.no_grad():
                results = [self.route(self.inputs, self.weights, self.num_iters)]
        return results

    def finished(self):
        """What `run` returns, once it is computed."""
        results = self.run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return results

    def timed(self, repeats):
        """Seconds of one run, the mean of several queued ones: wall, and of all threads."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(repeats - 1):
            self.run()
        self.finished()
        return {
            "wall_s": (time.perf_counter() - wall) / repeats,
            "cpu_s": (time.process_time() - cpu) / repeats,
        }

    def peak_bytes(self):
        """How far memory grows in one run: of the card where there is one, else resident memory."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.finished()
            return torch.cuda.max_memory_allocated() - before
        self.inputs.grad = self.weights.grad = None
        before = peak = resident_bytes()
        done = threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, resident_bytes())

        watcher = threading.Thread(target=watch)
        watcher.start()
        self.run()
        peak = max(peak, resident_bytes())
        done.set()
        watcher.join()
        return peak - before


def resident_bytes():
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def answer(request, prepared):
    """Carries out one request."""
    name = request["name"]
    if request["do"] == "prepare":
        start = time.perf_counter()
        prepared[name] = Routing(request)
        results = prepared[name].finished()
        first_s = time.perf_counter() - start
        np.savez(request["results"], *[result.detach().cpu().numpy() for result in results])
        return {"first_s": first_s, "peak_bytes": prepared[name].peak_bytes()}
    if request["do"] == "run":
        return prepared[name].timed(request["repeats"])
    del prepared[name]
    return {}


def main():
    """Answers until the input ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what torch prints must not get between the answers
    torch.set_num_threads(int(sys.argv[1]))
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("highest")  # float32 as ours, not TensorFloat-32
    prepared = {}
    print(json.dumps({"torch": torch.__version__, "cuda": torch.cuda.is_available()}), file=channel, flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), prepared)
        except Exception as error:
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(reply), file=channel, flush=True)


if __name__ == "__main__":
    main()
