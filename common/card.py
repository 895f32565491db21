"""The model card that makes a saved model ready to be shared: README.md in its folder."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import cached_file

from common.data import read_document

# Jinja; huggingface.co reads the metadata that `card_data` stands for.
TEMPLATE = """---
{{ card_data }}
---

# {{ base }}, trained by {{ "CF-GRPO's code" if stage == "grpo" else "SFT on reasoning traces" }}

- Base model: `{{ base }}`. Licence of the base:
  {{ licence.values() | select | join(", ") or "unknown, see the base model" }}.
- Data: `{{ run.dataset_name }}`
{%- if stage == "sft" and run.toy_dir %}, of which SFT reads train_cot.json{% endif %}.
- Recipe: `{{ run.recipe }}`{% if run.lora_rank %}, LoRA of rank {{ run.lora_rank }}, merged
{%- endif %}, seed {{ run.seed }}, {{ run.ranks }} rank(s), code {{ run.revision or "unknown" }}.
- Command: `{{ run.command | join(" ") }}`
- Method: [CF-GRPO](https://arxiv.org/abs/2606.18441).

## Held-out questions
{% if result.after %}
{{ result.heldout_questions }} questions of `{{ run.eval_dataset_name }}`,
which were not trained on. {{ result.heldout_skipped | length }} more could not be used.
{% set words = {
  "greedy": "accuracy, greedy", "sampled": "accuracy, sampled", "length": "tokens of an answer",
  "consensus": "consensus score", "evidence_use": "frame use on the true evidence",
  "paper_consensus": "consensus score, the paper's",
  "paper_evidence_use": "frame use on the true evidence, the paper's",
  "evidence_chance": "frame use on the true evidence, by chance"} %}
| measure |{% if stage == "grpo" %} before GRPO | after GRPO |{% else %} this model |{% endif %}
|---|---|{{ "---|" if stage == "grpo" }}
{%- for name, after in result.after.items() %}
| {{ words.get(name, name) }} | {{ "%.4f" | format(result.before[name]) }} |
{%- if stage == "grpo" %} {{ "%.4f" | format(after) }} |{% endif %}
{%- endfor %}
{% else %}
None were given: how well this model answers is not known.
{% endif %}
## Limits

- {{ result.skipped | length }} training question(s) could not be used and were skipped.
- The numbers are of one run with one seed, on the questions above alone. Nothing else was
  evaluated: no other benchmark, no safety, no bias.
- It was trained to answer `<think>...</think><answer>...</answer>` about at most {{ run.frames }}
  frames of at most {{ run.max_pixels }} pixels; other prompts and sizes were not tried.
- What the base model's licence and card forbid or warn of holds here, too.

## Every setting

```json
{{ run | tojson(indent=1) }}
```
"""


def write_cards(output, result):
    """Writes the card of each model that a finished run has saved. Nothing is uploaded.

    Args:
        output: folder of the run, with run.json.
        result: what result.json holds.
    """
    run = read_document(Path(output, "run.json"))
    base = run["model_name_or_path"]
    # The base model's own card, if it has one.
    theirs = ModelCardData()
    file = cached_file(
        base,
        "README.md",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file:
        theirs = ModelCard.load(file, ignore_metadata_errors=True).data
    licence = {name: theirs.get(name) for name in ("license", "license_name", "license_link")}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="video-text-to-text",
        # A folder has no hub id; its own card may know of one.
        base_model=theirs.base_model if Path(base).is_dir() else base,
        tags=["videocfr", run["recipe"]],
        **licence,
    )
    facts = dict(base=base, licence=licence, run=run, result=result)
    for stage in ("sft", "grpo"):
        folder = Path(output, stage)
        if folder.is_dir():
            card = ModelCard.from_template(data, template_str=TEMPLATE, stage=stage, **facts)
            card.save(folder / "README.md")
