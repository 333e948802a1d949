"""Writes tests/fixtures/generation/sampling.json: probabilities that transformers' own logits processors leave.

    PYTHON_WITH_TRANSFORMERS tools/make_sampling_fixtures.py

The processors are those that its generate() builds for these settings, in its order. Presence and frequency penalties, which it
lacks, stand behind its repetition penalty.
"""

import json
import random
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, Qwen3Config, Qwen3ForCausalLM
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

VOCABULARY, PROMPT, WRITTEN = 96, 12, 6
# Four rows with different settings for each case.
CASES = {
    "temperature": [dict(temperature=value) for value in (0.3, 0.8, 1.0, 1.7)],
    "top_k": [dict(top_k=value) for value in (0, 1, 7, 40)],
    "top_p": [dict(top_p=value) for value in (0.2, 0.6, 0.9, 1.0)],
    "min_p": [dict(min_p=value) for value in (0.0, 0.02, 0.1, 0.4)],
    "repetition_penalty": [dict(repetition_penalty=value) for value in (0.8, 1.0, 1.1, 2.0)],
    "presence_penalty": [dict(presence_penalty=value) for value in (-1.0, 0.0, 0.7, 1.5)],
    "frequency_penalty": [dict(frequency_penalty=value) for value in (-0.5, 0.0, 0.4, 1.2)],
    "all": [
        dict(temperature=0.6, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.05),
        dict(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5),
        dict(temperature=1.3, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=0.9, frequency_penalty=0.2),
        dict(temperature=2.0, top_k=30, top_p=0.7, min_p=0.1, repetition_penalty=1.3, presence_penalty=-0.4),
    ],
}


class Written(LogitsProcessor):
    """Presence and frequency penalties of the tokens after the prompt."""

    def __init__(self, presence: float, frequency: float):
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids, scores):
        """Scores less the penalties."""
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids[:, PROMPT:], torch.ones(len(scores), WRITTEN))
        return scores - self.presence * (counts > 0) - self.frequency * counts


def processors(model, settings):
    """What generate() would run for these settings, with `Written` among them."""
    settings = dict(settings)
    written = Written(settings.pop("presence_penalty", 0.0), settings.pop("frequency_penalty", 0.0))
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    built = list(model._get_logits_processor(generation_config=config, input_ids_seq_length=PROMPT + WRITTEN))
    place = sum(isinstance(processor, RepetitionPenaltyLogitsProcessor) for processor in built)
    return LogitsProcessorList([*built[:place], written, *built[place:]])


def main():
    """Draw logits and tokens, write the probabilities."""
    draw = random.Random(0)
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    model = Qwen3ForCausalLM(Qwen3Config(intermediate_size=8, head_dim=8, **shape))
    logits = (2.5 * torch.randn(VOCABULARY)).float()
    prompt = [draw.randrange(VOCABULARY) for _ in range(PROMPT)]
    # Likely tokens are among those written, one of them twice.
    likely = logits.topk(5).indices.tolist()
    written = [likely[0], likely[2], likely[0], likely[4], draw.randrange(VOCABULARY), draw.randrange(VOCABULARY)]
    ids = torch.tensor([prompt + written])
    cases = {
        name: [
            {"settings": row, "probabilities": processors(model, row)(ids, logits[None].clone()).softmax(-1)[0].tolist()}
            for row in rows
        ]
        for name, rows in CASES.items()
    }
    folder = Path(__file__).parents[1] / "tests" / "fixtures" / "generation"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"logits": logits.tolist(), "prompt": prompt, "written": written, "cases": cases}
    (folder / "sampling.json").write_text(json.dumps(content) + "\n", "utf-8")


if __name__ == "__main__":
    main()
