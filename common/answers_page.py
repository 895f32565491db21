"""From the numbers of an evaluation to the answers behind them: `visualize.py answers`."""

from jinja2 import Template

from common import scores
from common.pages import page_path, write_page
from common.plots import name_paths

# Jinja: a table of counts that lead to their answers.
PAGE = """{% set items = 100 %}{# the most that are listed for a number #}
{% set verdicts = questions | map(attribute="verdict") | unique | sort %}
{% set tasks = questions | groupby("task", case_sensitive=true) %}
<p>{% for run in runs %}{{ names[loop.index0] }}: {{ run | length }} questions. {% endfor %}
{{ questions | length }} are in every file. An answer is right if its official score is 1.</p>
<div><table>
<tr><th>{{ names | join(" → ") }}</th>{% for verdict in verdicts %}<th>{{ verdict }}</th>
{%- endfor %}</tr>
{% for task, rows in tasks %}<tr><td>{{ task }}</td>
{% for verdict in verdicts %}<td><a href="#{{ task | urlencode }}-{{ loop.index }}">
{{- rows | selectattr("verdict", "equalto", verdict) | list | length }}</a></td>
{% endfor %}</tr>{% endfor %}
</table></div>
{% for task, rows in tasks %}{% for verdict in verdicts %}
{% set asked = rows | selectattr("verdict", "equalto", verdict) | list %}
<h2 id="{{ task | urlencode }}-{{ loop.index }}">{{ task }}, {{ verdict }}:
{{ asked[:items] | length }} of {{ asked | length }}</h2>
{% for one in asked[:items] %}{% set first = one.answers[0] %}
<details><summary>{{ first.problem_id }}: {{ first.problem }}</summary>
<p>{{ first.options | join(", ") }}</p><p>Right: {{ first.solution }}</p>
{% for answer in one.answers %}<h3>{{ names[loop.index0] }}, {{ "%.3f" | format(answer.reward) }}
{%- if answer.unread %}, unread: {{ answer.unread }}{% endif %}</h3>
<pre>{{ answer.error or answer.output }}</pre>{% endfor %}
</details>{% endfor %}{% endfor %}{% endfor %}"""


def answers_report(predictions, label, output):
    """Write the page of a file of answers, or of several files of answers to the same questions.

    Args:
        predictions: paths of predictions or reports. label: one a file, or None for their names.
        output: the page.
    Returns:
        Path of the page.
    """
    output = page_path(output)
    names = name_paths(predictions, label)
    runs = []
    for path in predictions:
        records = scores.make_report(scores.read_predictions(path)[0])["results"]
        runs.append({record["problem_id"]: record for record in records})
        # Refuses other questions under the same names, and answers that are mostly unread.
        if len(runs) > 1:
            scores.compare(list(runs[0].values()), records)
    questions = []
    for key, first in runs[0].items():
        answers = [run[key] for run in runs if key in run]
        if len(answers) == len(runs):
            verdict = " → ".join("right" if answer["correct"] else "wrong" for answer in answers)
            task = first["task"] or first["problem_type"]
            questions.append({"task": task, "verdict": verdict, "answers": answers})
    body = Template(PAGE, autoescape=True).render(names=names, runs=runs, questions=questions)
    return write_page(output, "Answers", body, {})
