#!/usr/bin/env python3
"""How well merges of constant-rate snapshots, loss laws and earlier anneals tell the loss of a real anneal.

Usage: python scripts/experiments/merge_prediction.py CONFIG.yaml --steps N --out DIR [--kiln build/release/kiln]
           [--seeds 1,2,3] [--ends 0.5,1] [--shares 0.1,0.2] [--shapes linear,1-sqrt] [--ratios 0,0.1]
           [--device cpu|cuda] [KEY=VALUE ...]
       python scripts/experiments/merge_prediction.py --quick --out DIR     (no data needed, a minute or two on a processor)

For each seed: a trunk of N steps (warm-up, then a constant rate; KEY=VALUE overrides the configuration) with fp32
snapshots. At each end T, a share of the trunk, a real anneal for each share D/T, shape and last rate branches off at
T - D with optimizer states and the identical batches (`kiln predict --anneal-check`), and all predictors are held
against it on the whole held-out data. At a seed's first T no anneal is known; its later ones learn from its earlier T.

(N, V) of the plain mean is chosen on the first seed at the first T, by mean absolute error, and reported everywhere
else. Everything that exists is kept, so the command goes on where it was stopped. Per seed DIR/seed_S.json; in the end
DIR/summary.json and the table DIR/summary.md: signed error (predicted minus annealed, nats), mean absolute error, share
of the gap from the last snapshot to the anneal that was recovered, and Spearman's rank correlation over the anneals of
one seed at one T.

Disk, at 60M with AdamW: 0.25 GB a snapshot (--snapshots of them), 0.75 GB a branching point and anneal, each seed.
"""

import argparse
import json
import math
import os
import pathlib
import random
import shutil
import statistics
import struct
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
QUICK = """
model: {hidden: 32, ffn: 48, heads: 4, kv_heads: 2, layers: 2, vocab: 64}
data: {train: %(dir)s/train.bin, valid: %(dir)s/valid.bin, seq_len: 32}
batch: {sequences: 8}
schedule: {peak_lr: 0.01, warmup_steps: 20}
optimizer: {kind: adamw, weight_decay: 0.1}
eval: {every: 0, tokens: 1}
"""


def fail(message):
    sys.exit(f"merge_prediction: {message}")


def words(kind):
    return lambda text: [kind(word) for word in text.split(",") if word]


def write(path, text):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_shard(path, tokens, seed):
    """llm.c's uint16 shard of a noisy walk over 64 words: something to learn, and something that cannot be learnt."""
    draw, token, ids = random.Random(seed), 1, []
    for _ in range(tokens):
        token = (token * 5 + min(draw.randrange(6), draw.randrange(6))) % 64
        ids.append(token)
    header = [20240520, 1, tokens] + [0] * 253
    path.write_bytes(struct.pack("<256i", *header) + struct.pack(f"<{tokens}H", *ids))


def quick_config(out):
    out.mkdir(parents=True, exist_ok=True)
    for name, tokens, seed in (("train", 120000, 1), ("valid", 20000, 2)):
        if not (out / f"{name}.bin").exists():
            write_shard(out / f"{name}.bin", tokens, seed)
    write(out / "quick.yaml", QUICK % {"dir": out})
    return out / "quick.yaml"


class Experiment:
    def __init__(self, arguments):
        self.arguments = arguments
        self.out = arguments.out.resolve()
        self.total = arguments.steps
        self.every = max(1, self.total // arguments.snapshots)
        # Ends have a snapshot, and so have the branching points, which have a checkpoint.
        self.ends = sorted({self.on_grid(share * self.total) for share in arguments.ends})
        self.anneals = [(share, shape, ratio) for share in arguments.shares for shape in arguments.shapes
                        for ratio in arguments.ratios]  # fmt: skip
        self.begins = sorted({self.begin(end, share) for end in self.ends for share in arguments.shares})
        if any(self.begin(end, share) >= end for end in self.ends for share in arguments.shares):
            fail(f"an anneal would have no steps with {arguments.snapshots} snapshots; give more, or larger --shares")

    def on_grid(self, step):
        return max(1, math.floor(step / self.every + 0.5)) * self.every

    def begin(self, end, share):
        return self.on_grid(end * (1 - share))

    def kiln(self, *command):
        command = [str(self.arguments.kiln), *(str(word) for word in command)]
        print("+", " ".join(command), file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            fail(f"`{' '.join(command[:3])}` ended with exit code {done.returncode}; start this command again to go on")
        return done.stdout

    def trunk(self, seed):
        run = self.out / f"seed_{seed}" / "trunk"
        if not (run / f"step_{self.total:08}" / "MANIFEST.json").exists():
            self.kiln("train", self.arguments.config, "--quiet", f"run.dir={run}", f"run.seed={seed}",
                      "schedule.kind=wsd", "schedule.decay_steps=0", f"snapshots.every={self.every}",
                      "snapshots.dtype=fp32", f"checkpoint.every={math.gcd(*self.begins)}",
                      "checkpoint.keep=0", *self.arguments.overrides, f"schedule.total_steps={self.total}")  # fmt: skip
        for checkpoint in run.glob("step_*"):  # of all, only the branching points and the last are needed
            if checkpoint.name[5:].isdigit() and int(checkpoint.name[5:]) not in (*self.begins, self.total):
                shutil.rmtree(checkpoint)
        return run

    def prediction(self, seed, run, end, share, shape, ratio):
        path = self.out / f"seed_{seed}" / "predictions" / f"{shape}_{ratio:g}_{share:g}_{end:08}.json"
        if not path.exists():
            lists = [",".join(str(n) for n in values) for values in (self.arguments.counts, self.arguments.strides)]
            write(path, self.kiln("predict", run, "--anneal-check", "--json", "--end", end,
                                  "--share", (end - self.begin(end, share)) / end,
                                  "--shape", shape, "--final-ratio", ratio, "--counts", lists[0],
                                  "--strides", lists[1], "--tokens", self.arguments.tokens,
                                  "--device", self.arguments.device))  # fmt: skip
        prediction = json.loads(path.read_text())
        prediction["share"] = share
        return prediction

    def claim(self):
        """Results of other settings are not mixed in: what is kept in OUT was made with these."""
        mine = {"config": str(self.arguments.config), "overrides": self.arguments.overrides, "steps": self.total,
                "snapshots": self.arguments.snapshots, "counts": self.arguments.counts,
                "strides": self.arguments.strides, "tokens": self.arguments.tokens,
                "device": self.arguments.device}  # fmt: skip
        path = self.out / "arguments.json"
        if path.exists() and json.loads(path.read_text()) != json.loads(json.dumps(mine)):
            fail(f"{self.out} holds results of other arguments ({path}); give another --out")
        write(path, json.dumps(mine, indent=1) + "\n")

    def run(self):
        self.claim()
        by_seed = {}
        for seed in self.arguments.seeds:
            run = self.trunk(seed)
            by_seed[seed] = [self.prediction(seed, run, end, *anneal) for end in self.ends for anneal in self.anneals]
            write(self.out / f"seed_{seed}.json",
                  json.dumps({"seed": seed, "total_steps": self.total, "snapshots_every": self.every,
                              "config": str(self.arguments.config), "overrides": self.arguments.overrides,
                              "predictions": by_seed[seed]}, indent=1) + "\n")  # fmt: skip
        return by_seed


def cells(prediction):
    """Loss of the plain mean by (N, V in steps)."""
    return {(cell["count"], cell["every_steps"]): cell["loss"] for cell in prediction["sweep"]}


def choose_cell(predictions):
    """The (N, V) of least mean absolute error, of those that every prediction has."""
    common = set.intersection(*(set(cells(p)) for p in predictions))
    if not common:
        fail("no (N, V) of the sweep fits all anneals of the first seed; give smaller --counts or --strides")

    def mean_error(cell):
        return statistics.mean(abs(cells(p)[cell] - p["annealed_loss"]) for p in predictions)

    return min(sorted(common), key=mean_error)


def ranks(values):
    order = sorted(values)
    return [statistics.mean(i for i, other in enumerate(order) if other == value) for value in values]


def spearman(a, b):
    """None for fewer than three, or where one side does not vary."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    x, y = ranks(a), ranks(b)
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((p - mx) * (q - my) for p, q in zip(x, y)) / math.sqrt(
        sum((p - mx) ** 2 for p in x) * sum((q - my) ** 2 for q in y))  # fmt: skip


def outcomes(by_seed, first_end, chosen):
    """One row for each predictor that told a loss, of each anneal."""
    rows = []
    for number, (seed, predictions) in enumerate(by_seed.items()):
        for p in predictions:
            told = {q["name"]: q["loss"] for q in p["predictors"] if q["loss"] is not None}
            told["as trusted"] = p["predicted_loss"]
            seen = number == 0 and p["anneal"]["end"] == first_end  # what (N, V) was chosen on
            if not seen and chosen in cells(p):
                told[f"mean, N {chosen[0]}, V {chosen[1]}"] = cells(p)[chosen]
            for name, loss in told.items():
                rows.append({"seed": seed, "end": p["anneal"]["end"], "name": name, "loss": loss,
                             "annealed": p["annealed_loss"], "last": p["last_loss"]})  # fmt: skip
    return rows


def summarise(rows):
    """By end and predictor, in the order in which they first appear."""
    table = []
    for end in sorted({row["end"] for row in rows}):
        here = [row for row in rows if row["end"] == end]
        for name in dict.fromkeys(row["name"] for row in here):
            mine = [row for row in here if row["name"] == name]
            errors = [row["loss"] - row["annealed"] for row in mine]
            gaps = [row["last"] - row["annealed"] for row in mine]
            recovered = [(row["last"] - row["loss"]) / gap for row, gap in zip(mine, gaps) if gap != 0]
            correlations = [spearman([r["loss"] for r in mine if r["seed"] == seed],
                                     [r["annealed"] for r in mine if r["seed"] == seed])
                            for seed in {r["seed"] for r in mine}]  # fmt: skip
            known = [c for c in correlations if c is not None]
            table.append({"end": end, "predictor": name, "anneals": len(mine),
                          "seeds": len({row["seed"] for row in mine}), "gap": statistics.mean(gaps),
                          "signed_error": statistics.mean(errors), "mae": statistics.mean(abs(e) for e in errors),
                          "worst": max(abs(e) for e in errors),
                          "recovered": statistics.mean(recovered) if recovered else None,
                          "rank_correlation": statistics.mean(known) if known else None})  # fmt: skip
    return table


def covered(by_seed):
    """How many intervals hold the real anneal."""
    all_predictions = [p for predictions in by_seed.values() for p in predictions]
    return sum(p["low"] <= p["annealed_loss"] <= p["high"] for p in all_predictions), len(all_predictions)


def markdown(arguments, table, chosen, coverage, precision):
    def cell(value, form):
        return "-" if value is None else format(value, form)

    lines = ["# Predicting an anneal from constant-rate snapshots", "",
             f"- Configuration: {arguments.config}{''.join(' ' + word for word in arguments.overrides)}",
             f"- Seeds {', '.join(str(s) for s in arguments.seeds)}; anneals over {arguments.shares} of the steps, "
             f"{' and '.join(arguments.shapes)}, to {arguments.ratios} of the peak rate; evaluated in {precision}",
             f"- N {chosen[0]}, V {chosen[1]} steps: least mean absolute error at seed {arguments.seeds[0]} and the first T,"
             " which its row leaves out",
             f"- Intervals that hold the real anneal: {coverage[0]} of {coverage[1]}", "",
             "| T | predictor | anneals | gap | signed error | mean absolute error | worst | of gap recovered | rank corr. |",
             "|-|-|-|-|-|-|-|-|-|"]  # fmt: skip
    for row in table:
        share = row["recovered"]
        lines.append(
            f"| {row['end']} | {row['predictor']} | {row['anneals']} | {row['gap']:.4f} | {row['signed_error']:+.4f} | "
            f"{row['mae']:.4f} | {row['worst']:.4f} | {'-' if share is None else f'{100 * share:.0f} %'} | "
            f"{cell(row['rank_correlation'], '.2f')} |"
        )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=pathlib.Path, nargs="?", help="of the trunk; its schedule becomes constant")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for the trunk")
    parser.add_argument("--steps", type=int, help="of the trunk")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--kiln", type=pathlib.Path, default=ROOT / "build/release/kiln")
    parser.add_argument("--seeds", type=words(int), default=[1, 2, 3], help="the first chooses (N, V)")
    parser.add_argument("--ends", type=words(float), default=[0.5, 1.0], help="T, as shares of the trunk")
    parser.add_argument("--shares", type=words(float), default=[0.1, 0.2], help="D / T")
    parser.add_argument("--shapes", type=words(str), default=["linear", "1-sqrt"])
    parser.add_argument("--ratios", type=words(float), default=[0.0, 0.1], help="last rates over the peak")
    parser.add_argument("--snapshots", type=int, default=100, help="of the whole trunk")
    parser.add_argument("--counts", type=words(int), default=[2, 3, 5, 10, 15], help="N of the sweep")
    parser.add_argument("--strides", type=words(int), default=[1, 2, 4], help="V of the sweep, in snapshots")
    parser.add_argument("--tokens", type=int, default=10**12, help="held-out; otherwise all, the same for every seed")
    parser.add_argument("--device", default="cpu", help="of the evaluations: cpu (f32), cuda (bf16) or auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model on made-up data")
    arguments = parser.parse_intermixed_args()
    if arguments.quick:
        if arguments.config is not None:  # then it is an override
            arguments.overrides.insert(0, str(arguments.config))
        arguments.config = quick_config(arguments.out.resolve())
        arguments.seeds, arguments.ratios = arguments.seeds[:2], arguments.ratios[:1]
        arguments.snapshots, arguments.counts, arguments.strides = 50, [2, 3, 5], [1, 2]
        arguments.steps = arguments.steps or 400
    if arguments.config is None or not arguments.config.is_file():
        fail(f"{arguments.config or 'CONFIG.yaml'}: no such configuration; name one of configs/, or give --quick")
    if not arguments.steps or arguments.steps < 20 or any("total_steps" in word for word in arguments.overrides):
        fail(f"--steps {arguments.steps}: give the steps of the trunk there, 20 or more")
    experiment = Experiment(arguments)
    by_seed = experiment.run()
    chosen = choose_cell([p for p in by_seed[arguments.seeds[0]] if p["anneal"]["end"] == experiment.ends[0]])
    rows = outcomes(by_seed, experiment.ends[0], chosen)
    table, coverage = summarise(rows), covered(by_seed)
    precision = by_seed[arguments.seeds[0]][0]["evaluated_in"]
    write(experiment.out / "summary.json",
          json.dumps({"chosen": {"count": chosen[0], "every_steps": chosen[1]}, "covered": coverage[0],
                      "predictions": coverage[1], "evaluated_in": precision, "table": table}, indent=1) + "\n")  # fmt: skip
    text = markdown(arguments, table, chosen, coverage, precision)
    write(experiment.out / "summary.md", text)
    print(text)


if __name__ == "__main__":
    main()
