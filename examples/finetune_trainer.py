"""Fine-tune a causal language model of transformers with Trainer, its loss fused; save, load, generate.

    pip install 'uncork[hf]' accelerate
    python finetune_trainer.py --model HuggingFaceTB/SmolLM2-135M --text my.txt --out-dir out
    python finetune_trainer.py                     # a small random model on made-up text: no download, seconds

uncork's lines are the three marked with an arrow; the rest is as it would be without it.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from uncork.hf import attach_head, from_pretrained, fuse_loss, verify


def blocks_of(ids: torch.Tensor, length: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of equal length; Trainer's model shifts the labels itself."""
    return [{"input_ids": block, "labels": block} for block in ids[: len(ids) // length * length].view(-1, length)]


def small_model() -> tuple[Any, torch.Tensor]:
    """A random Llama, and a text in which each word says the next: (7 w + 3) mod 64, or any word once in ten."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    words = [0]
    for _ in range(20_000):
        any_word = torch.rand(()) < 0.1
        words.append(int(torch.randint(64, ())) if any_word else (7 * words[-1] + 3) % 64)
    return LlamaForCausalLM(config), torch.tensor(words)


def main() -> None:
    """Trains, saves, loads and generates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name or a folder; None: a small random one")
    parser.add_argument("--text", type=Path, help="UTF-8; needed with --model")
    parser.add_argument("--head", help='attach a head too, for instance "plif"')
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, help="None: 3e-5, or 3e-3 for the random model")
    parser.add_argument("--out-dir", type=Path, default=Path("finetuned"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = None
    if arguments.model is None:
        model, ids = small_model()
    elif arguments.text is None:
        parser.error("--text: expected a file to train on with --model, got none")
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        ids = torch.tensor(tokenizer(arguments.text.read_text(encoding="utf-8")).input_ids)
    data = blocks_of(ids, arguments.length)
    held_out = max(1, len(data) // 10)

    if arguments.head:
        attach_head(model, arguments.head)  # <- identical logits at the start; its loss is fused
    else:
        fuse_loss(model)  # <- the same loss and gradients, without the (tokens, V) logits
    verify(model, reload=False).require()  # <- training, evaluation and generate agree; raises where they do not

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.out_dir / "checkpoints"), max_steps=arguments.steps, per_device_train_batch_size=8,
            learning_rate=arguments.lr or (3e-3 if arguments.model is None else 3e-5), logging_steps=50,
            save_strategy="no", report_to=[], prediction_loss_only=True, use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=data[held_out:],
        eval_dataset=data[:held_out],
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")

    model.save_pretrained(arguments.out_dir)
    again: Any = from_pretrained(arguments.out_dir)  # with its head, if one was attached
    start = ids[: arguments.length // 4][None]
    found = again.generate(start, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, start.shape[1] :]
    print("goes on with:", tokenizer.decode(found) if tokenizer else found.tolist())


if __name__ == "__main__":
    main()
