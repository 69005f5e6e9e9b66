#!/usr/bin/env python3
"""Is every adapter served as PEFT serves it, or refused?

    python3 tools/reference/conformance.py [--mlora build/mlora] [--only PATTERN] [--write]   (2 minutes)

Makes random small models and adapters with transformers and PEFT, asks `mlora score` for the
log-probability of every token of some prompts and of all tokens that may follow, and compares.
All adapters of a model that are served then answer in one batch of `mlora generate`. Needs the
packages of requirements.txt; without them it makes itself a virtual environment in build/venv.

The verdict of a case is one of:
  served   what mlora gives is within the bar
  refused  mlora ended with status 2 and one line that says why, and computed nothing
  WRONG    anything else: the script ends with status 1

The bar, in nats:
  f32   the largest difference is at most 1e-4, times the root mean square of the logits where that
        is over 1. Each f32 case and, computing in f32, each bf16 case.
  bf16  mlora computing in bf16 is no farther from PEFT in f32 than PEFT in bf16 is, both starting
        from the same stored bf16 values. The two errors are sums of other roundings of the same
        size, so in a single case either may be the larger. Over all cases together, where that
        evens out, mlora's mean error must not exceed PEFT's. In one case, over some 500 positions,
        the ratio of the means varies by 0.03 and that of the largest errors by 0.21 (standard
        deviations over the cases), so the limits are four of them: BF16_MEAN and BF16_MAX.
"""
import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
BF16_MEAN, BF16_MAX = 1.12, 1.85
EFFECT_MIN = 0.02  # a case whose feature changes no log-probability by this much shows nothing
GENERATED = 6


def enter_environment():
    """Run on in build/venv, made if it is not there, unless the packages are here already."""
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft", "safetensors")):
        return
    venv = os.path.join(ROOT, "build", "venv")
    python = os.path.join(venv, "bin", "python3")
    if os.path.realpath(sys.prefix) == os.path.realpath(venv):
        sys.exit(f"conformance: {venv} lacks packages of requirements.txt; remove it and run again")
    if not os.path.exists(os.path.join(venv, "ready")):
        print(f"conformance: installing the packages of requirements.txt in {venv}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", os.path.join(HERE, "requirements.txt")], check=True)
        open(os.path.join(venv, "ready"), "w").close()
    os.execv(python, [python, os.path.abspath(__file__), *sys.argv[1:]])


enter_environment()
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")
warnings.filterwarnings("ignore")
sys.path.insert(0, HERE)

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft.tuners.lora.layer import Linear  # noqa: E402
from peft.tuners.lora.variants import QALoraLinearVariant  # noqa: E402

import conformance_cases  # noqa: E402
import conformance_models  # noqa: E402

RESOLVE_VARIANT = Linear.resolve_lora_variant


class Wrong(Exception):
    pass


# ---- the reference --------------------------------------------------------------------------


def read_adapter(base_directory, dtype, directory, with_qalora=False):
    """The model in `dtype` with PEFT's adapter on it."""
    if with_qalora:  # PEFT has it for GPTQ layers only; the arithmetic is the same on any linear
        Linear.resolve_lora_variant = lambda self, **_: QALoraLinearVariant()
    try:
        model = conformance_models.read_model(base_directory, dtype)
        return PeftModel.from_pretrained(model, directory).eval()
    finally:
        Linear.resolve_lora_variant = RESOLVE_VARIANT


@torch.no_grad()
def reference(model, prompts):
    """Of each prompt, the log-probabilities of its tokens, but the first, and of every next token;
    and the root mean square of the logits."""
    values, squares = [], []
    for ids in prompts:
        logits = model(input_ids=torch.tensor([ids])).logits[0].float()
        squares.append(logits.pow(2).mean().item())
        logprobs = logits.log_softmax(-1)
        own = logprobs[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.long)[:, None])[:, 0]
        values.append(torch.cat([own, logprobs[-1]]))
    return values, max(squares) ** 0.5


def without(case, base, directory):
    """What the reference would be without the feature of the case."""
    stripped = directory + "-without"
    shutil.copytree(directory, stripped)
    if callable(case.without):
        case.without(stripped)
    else:
        conformance_cases.config_edit(**case.without)(stripped)
        if {"modules_to_save", "bias", "trainable_token_indices"} & set(case.without):  # PEFT reads what lies there
            conformance_cases.keep("lora_")(stripped)
    return reference(read_adapter(base.directory, "f32", stripped), case.prompts)[0]


def farthest(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


# ---- mlora ----------------------------------------------------------------------------------


class Refused(Exception):
    pass


def run_mlora(command):
    """Its output. Refused is raised with the one line that it ends with."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        raise Wrong("did not end within 60 s")
    lines = done.stderr.strip().splitlines()
    if done.returncode == 0:
        return done.stdout
    if done.returncode != 2:
        raise Wrong(f"ended with status {done.returncode}: {' '.join(lines)[:300]}")
    if len(lines) != 1 or done.stdout:
        raise Wrong(f"refused with {len(lines)} lines and {len(done.stdout)} bytes of output: {lines[:3]}")
    raise Refused(lines[0].removeprefix("mlora: adapter a: ").removeprefix("mlora: "))


def score(options, base_directory, directory, ids, dtype, lenient):
    """As reference() gives it for one prompt."""
    command = [options.mlora, "score", "--model", base_directory, "--ids", ",".join(map(str, ids)), "--json", "--top",
               str(conformance_models.VOCABULARY), "--dtype", dtype, "--backend", options.backend, "--threads", "1", "--quiet"]
    if directory:
        command += ["--adapters", f"a={directory}", "--adapter", "a"]
    answer = json.loads(run_mlora(command + (["--lenient"] if lenient else [])))
    own = [t["logprob"] for t in answer["tokens"]]
    following = {t["id"]: t["logprob"] for t in answer["next"]}
    if [t["id"] for t in answer["tokens"]] != ids or own[0] is not None:
        raise Wrong("score's tokens are not those of the prompt")
    if sorted(following) != list(range(conformance_models.VOCABULARY)) or None in own[1:] + list(following.values()):
        raise Wrong("score left out tokens")
    return torch.tensor(own[1:] + [following[i] for i in sorted(following)], dtype=torch.float32)


# ---- one case -------------------------------------------------------------------------------


class Row:
    """A line of the table."""

    def __init__(self, name, model, weights):
        self.name, self.model, self.weights = name, model, weights
        self.delta = self.bar = self.effect = self.bf16 = None
        self.must_be_refused = False
        self.verdict, self.reason = "", ""

    def fail(self, reason):
        self.verdict = "WRONG"
        self.reason = f"{self.reason}; {reason}" if self.reason else reason

    def cells(self):
        number = lambda x: "" if x is None else f"{x:.1e}"  # noqa: E731
        bf16 = "" if self.bf16 is None else "{0:.2f} / {1:.2f}".format(*self.ratios())
        return [self.name, self.model, self.weights, number(self.delta), number(self.bar), bf16,
                "" if self.effect is None else f"{self.effect:.2g}", self.verdict, self.reason]

    def ratios(self):
        mean, largest, peft_mean, peft_largest = self.bf16
        return mean / peft_mean, largest / peft_largest


def check_refusal(row, case, message):
    """A case that must be refused says the file, the field and the remedy."""
    if "adapter_config.json" not in message and "adapter_model." not in message:
        row.fail("the message names no file")
    if case.refused not in message:
        row.fail(f"the message does not name {case.refused}")
    if "; " not in message and "needed" not in message:
        row.fail("the message names neither a remedy nor what is needed")


def error_of(values, truth):
    """The mean over all positions and the largest. A last position counts once: the mean over what may follow."""
    last = conformance_models.VOCABULARY
    differences = [(x - y).abs() for x, y in zip(values, truth)]
    positions = torch.cat([torch.cat([d[:-last], d[-last:].mean()[None]]) for d in differences])
    return positions.mean().item(), max(d.max().item() for d in differences)


def compare_bf16(row, ours, theirs, truth):
    row.bf16 = [*error_of(ours, truth), *error_of(theirs, truth)]
    mean, largest = row.ratios()
    if not (mean <= BF16_MEAN and largest <= BF16_MAX):
        row.fail(f"in bf16 its error is {mean:.2f} times PEFT's in the mean, {largest:.2f} times in the largest")


def write_fixture(options, case, base, adapter, truth, effect):
    """The model, the adapter and two prompts with the reference's values, for tests without Python:
    OUT/models/NAME and OUT/SLUG/{adapter_config.json,adapter_model.safetensors,expected.json}."""
    model = os.path.basename(base.directory)
    home = os.path.join(options.fixtures, "models", model)
    if not os.path.exists(home):
        os.makedirs(home)
        for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
            shutil.copy(os.path.join(base.directory, name), home)
    home = os.path.join(options.fixtures, re.sub("[^a-z0-9]+", "-", f"{case.name} {model}".lower()).strip("-"))
    os.makedirs(home)
    shutil.copy(f"{adapter}/adapter_model.safetensors", home)
    config = json.load(open(f"{adapter}/adapter_config.json"))
    config["base_model_name_or_path"] = model
    json.dump(config, open(f"{home}/adapter_config.json", "w"), indent=1)
    last = conformance_models.VOCABULARY
    rounded = lambda values: [round(v, 6) for v in values.tolist()]  # noqa: E731
    prompts = [{"ids": ids, "logprobs": rounded(values[:-last]), "next": rounded(values[-last:])}
               for ids, values in list(zip(case.prompts, truth))[-4:-2]]
    with open(f"{home}/expected.json", "w") as out:
        json.dump({"case": case.name, "model": model, "effect": round(effect, 3), "prompts": prompts}, out)


def compare(options, row, case, base, directory):
    """Fill the row of a served adapter. Returns the reference in f32."""
    adapter = f"{directory}/adapter"
    truth_directory = f"{directory}/reference" if os.path.exists(f"{directory}/reference") else adapter
    pool = ThreadPoolExecutor(os.cpu_count())

    def scores(dtype, prompts):
        return list(pool.map(lambda ids: score(options, base.directory, adapter, ids, dtype, case.lenient), prompts))

    if case.refused:
        scores("f32", case.prompts)
        raise Wrong("was served")
    model = read_adapter(base.directory, "f32", truth_directory, case.qalora)
    truth, spread = reference(model, case.prompts)
    plain = without(case, base, truth_directory) if case.without else base.values(case.prompts)
    row.effect = farthest(truth, plain)
    if case.same_as_base and row.effect > 0:
        raise Wrong("the case is no good: PEFT differs from the base")
    if not case.same_as_base and row.effect < EFFECT_MIN:
        raise Wrong("the case is no good: its feature changes nothing")

    if options.fixtures and case.fixture:
        write_fixture(options, case, base, adapter, truth, row.effect)
    ours = scores("f32", case.prompts)
    row.delta, row.bar, row.verdict = farthest(ours, truth), 1e-4 * max(1.0, spread), "served"
    if not row.delta <= row.bar:
        row.fail(f"is {row.delta:.2g} from PEFT")

    if case.weights == "bf16":
        more = case.prompts + conformance_cases.MORE
        rounded, _ = reference(read_adapter(base.directory, "bf16", truth_directory), more)
        compare_bf16(row, scores("bf16", more), rounded, truth + reference(model, conformance_cases.MORE)[0])
    return model


def run_case(options, case, base, directory):
    """Returns the row and, if it was served, the reference in f32."""
    row = Row(case.name, case.model, case.weights)
    row.must_be_refused = case.refused is not None
    model = None
    os.makedirs(directory)
    torch.manual_seed(case.seed)
    case.make(base.model, directory)
    try:
        model = compare(options, row, case, base, directory)
    except Refused as refusal:
        work = os.path.dirname(base.directory) + "/"
        row.verdict, row.reason = "refused", str(refusal).replace(directory + "/adapter/", "").replace(work, "")
        if case.refused:
            check_refusal(row, case, str(refusal))
    except Wrong as wrong:
        row.fail(str(wrong))
    return row, model


# ---- the base, and all of its adapters in one batch -----------------------------------------


class Base:
    def __init__(self, name, weights, work):
        self.name, self.weights = name, weights
        self.directory = os.path.join(work, f"{name}-{weights}")
        os.makedirs(self.directory)
        conformance_models.write_model(self.directory, name, weights)
        self.model = conformance_models.read_model(self.directory, "f32")

    def values(self, prompts):
        return reference(self.model, prompts)[0]


def base_case(options, base):
    """The model without an adapter."""
    row = Row("no adapter", base.name, base.weights)
    prompts = conformance_cases.PROMPTS
    try:
        truth, spread = reference(base.model, prompts)
        ours = [score(options, base.directory, None, ids, "f32", False) for ids in prompts]
        row.delta, row.bar, row.verdict = farthest(ours, truth), 1e-4 * max(1.0, spread), "served"
        if not row.delta <= row.bar:
            row.fail(f"is {row.delta:.2g} from transformers")
        if base.weights == "bf16":
            more = conformance_cases.PROMPTS + conformance_cases.MORE
            rounded, _ = reference(conformance_models.read_model(base.directory, "bf16"), more)
            ours = [score(options, base.directory, None, ids, "bf16", False) for ids in more]
            compare_bf16(row, ours, rounded, base.values(more))
    except (Refused, Wrong) as wrong:
        row.fail(str(wrong))
    return row


@torch.no_grad()
def mixed_batch(options, base, served):
    """Every adapter that was served and the base, each with two prompts, all in one batch: what
    each generates is what its reference finds most likely, with the same log-probabilities."""
    row = Row(f"one batch: the base and {len(served)} adapters", base.name, base.weights)
    jobs = [(None, base.model, ids) for ids in conformance_cases.PROMPTS[1:3]]
    for i, (case, directory, model) in enumerate(served):
        jobs += [(f"a{i}", model, ids) for ids in (case.prompts[1], case.prompts[2])]
    path = os.path.join(base.directory, "jobs.jsonl")
    with open(path, "w") as out:
        for name, _, ids in jobs:
            out.write(json.dumps({"adapter": name, "ids": ids, "max_tokens": GENERATED}) + "\n")
    command = [options.mlora, "generate", "--model", base.directory, "--input", path, "--json", "--logprobs", "1",
               "--temperature", "0", "--ignore-eos", "--dtype", "f32", "--backend", options.backend, "--quiet"]
    for i, (_, directory, _) in enumerate(served):
        command += ["--adapters", f"a{i}={directory}/adapter"]

    row.delta, row.bar, row.verdict = 0.0, 0.0, "served"
    try:
        answers = [json.loads(line) for line in run_mlora(command).splitlines()]
    except (Refused, Wrong) as wrong:
        row.fail(str(wrong))
        return row
    for answer, (name, model, ids) in zip(answers, jobs, strict=True):
        logits = model(input_ids=torch.tensor([ids + answer["ids"]])).logits[0].float()[len(ids) - 1:-1]
        truth = logits.log_softmax(-1)
        ours = torch.tensor([t["logprob"] for t in answer["logprobs"]])
        bar = 1e-4 * max(1.0, logits.pow(2).mean().sqrt().item())
        chosen = truth.gather(1, torch.tensor(answer["ids"])[:, None])[:, 0]
        delta = max((ours - chosen).abs().max().item(), (truth.max(-1).values - chosen).max().item())
        row.delta, row.bar = max(row.delta, delta), max(row.bar, bar)
        if len(answer["ids"]) != GENERATED or not delta <= bar:
            which = served[int(name[1:])][0].name if name else "the base"
            row.fail(f"{which}: is {delta:.2g} from PEFT")
    return row


def run_base(options, base, cases, show):
    rows, served = [base_case(options, base)], []
    show(rows[0])
    for i, case in enumerate(cases):
        directory = os.path.join(base.directory, "adapters", str(i))
        row, model = run_case(options, case, base, directory)
        rows.append(row)
        show(row)
        if row.verdict == "served" and not case.lenient:
            served.append((case, directory, model))
    if served:
        rows.append(mixed_batch(options, base, served))
        show(rows[-1])
    return rows


# ---- the table ------------------------------------------------------------------------------

HEAD = ["case", "model", "stored", "max Δ", "bar", "bf16 mean / max", "effect", "verdict", "reason"]
WIDTHS = [50, 12, 6, 8, 8, 15, 7, 8, 0]


def line(cells):
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS)).rstrip()


def bf16_total(rows):
    """The mean over all bf16 cases of mlora's mean error and of PEFT's."""
    errors = [row.bf16 for row in rows if row.bf16]
    return [sum(e[i] for e in errors) / len(errors) for i in (0, 2)] if errors else None


def summary(rows):
    count = {v: sum(row.verdict == v for row in rows) for v in ("served", "refused", "WRONG")}
    rightly = sum(row.verdict == "refused" and row.must_be_refused for row in rows)
    out = [f"{len(rows)} cases: {count['served']} served, {count['refused']} refused ({rightly} that must be, "
           f"{count['refused'] - rightly} that PEFT serves), {count['WRONG']} wrong"]
    f32 = [row for row in rows if row.delta is not None]
    if f32:
        out.append(f"f32: the largest difference is {max(row.delta for row in f32):.1e}, and at most "
                   f"{max(row.delta / row.bar for row in f32):.2g} of its bar")
    total = bf16_total(rows)
    if total:
        out.append(f"bf16: the mean error over {sum(row.bf16 is not None for row in rows)} cases is {total[0]:.5f}, "
                   f"PEFT's is {total[1]:.5f}: {total[0] / total[1]:.3f} of it")
    return out


def processor():
    try:
        text = open("/proc/cpuinfo").read()
        return re.search(r"model name\s*: (.*)", text).group(1)
    except (OSError, AttributeError):
        return platform.processor() or platform.machine()


def write_report(rows, options, seconds):
    version = subprocess.run([options.mlora, "--version"], capture_output=True, text=True).stdout.strip()
    escape = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    text = ["# Conformance: mlora against transformers and PEFT", "", "Made by", "",
            "    python3 tools/reference/conformance.py --write", "",
            f"with {version}, PEFT {peft.__version__}, transformers {transformers.__version__}, torch "
            f"{torch.__version__}, Python {platform.python_version()}, on {os.cpu_count()} cores of {processor()}, "
            f"in {seconds:.0f} seconds.", "",
            "Random small models and adapters made by PEFT. *max Δ* is the largest difference between mlora's and "
            "PEFT's log-probabilities, both computing in f32, over all tokens of the prompts and all that may follow; "
            "*bar* is what it may be. *bf16* is the error of mlora computing in bf16 over that of PEFT computing in "
            "bf16, each against PEFT in f32. *effect* is by how much the feature of the case changes a "
            "log-probability. `conformance.py` says more.", ""]
    text += [f"- {item}" for item in summary(rows)]
    text += ["", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    text += ["| " + " | ".join(map(escape, row.cells())) + " |" for row in rows]
    with open(os.path.join(HERE, "CONFORMANCE.md"), "w") as out:
        out.write("\n".join(text) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Compare mlora with transformers and PEFT, adapter by adapter.")
    parser.add_argument("--mlora", default=os.path.join(ROOT, "build", "mlora"), help="the program [build/mlora]")
    parser.add_argument("--backend", default="cpu", choices=("cpu", "cuda"), help="mlora's [cpu]")
    parser.add_argument("--only", metavar="PATTERN", help='cases whose "name model weights" this regex finds')
    parser.add_argument("--keep", metavar="DIR", help="leave models and adapters in DIR, which must not exist")
    parser.add_argument("--fixtures", metavar="OUT", help="write a case of each kind, with the reference's values, into OUT")
    parser.add_argument("--json", metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--no-refusals", action="store_true", help="a refusal of what PEFT serves is wrong")
    parser.add_argument("--write", action="store_true", help="write tools/reference/CONFORMANCE.md")
    options = parser.parse_args()
    options.mlora = os.path.abspath(options.mlora)
    if not os.access(options.mlora, os.X_OK):
        sys.exit(f"conformance: {options.mlora} is not there; build it with make, or give --mlora")
    if options.write and options.only:
        sys.exit("conformance: --write is for all cases; leave out --only")

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    groups = {}
    for case in conformance_cases.all_cases():
        if not options.only or re.search(options.only, f"{case.name} {case.model} {case.weights}"):
            groups.setdefault((case.model, case.weights), []).append(case)

    def show(row):
        if options.no_refusals and row.verdict == "refused" and not row.must_be_refused:
            row.fail("PEFT serves it")
        print(line(row.cells()), flush=True)

    work = options.keep or tempfile.mkdtemp(prefix="mlora-conformance-")
    rows, begin = [], time.time()
    print(line(HEAD))
    try:
        for (model, weights), cases in groups.items():
            rows += run_base(options, Base(model, weights, work), cases, show)
    finally:
        if not options.keep:
            shutil.rmtree(work)

    total = bf16_total(rows)
    print("", *summary(rows), sep="\n")
    if options.json:
        json.dump([vars(row) for row in rows], open(options.json, "w"), indent=1)
    if options.write:
        write_report(rows, options, time.time() - begin)
    print(f"{time.time() - begin:.0f} s")
    wrong = any(row.verdict == "WRONG" for row in rows)
    if total and total[0] > total[1]:
        print("WRONG: in bf16, mlora is farther from f32 than PEFT is")
        wrong = True
    sys.exit(1 if wrong else 0)


main()
