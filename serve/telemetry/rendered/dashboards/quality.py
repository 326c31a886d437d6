"""How good are the answers: golden sets, and a shadow's answers beside those that clients got."""

from __future__ import annotations

from serve.telemetry.rendered.dashboards.queries import ADAPTER, CHOSEN, VERSION, counted, marks, rate
from serve.telemetry.rendered.panels import Json, Panel, Query, Row, dashboard

EACH = "{{adapter}}@{{version}}"
BY = "adapter, version"
_SCORE = f"max by ({BY}) (loradock_golden_score{{{CHOSEN}}})"
_BOUNDS = f"max by ({BY}, bound) (loradock_golden_score_bound{{{CHOSEN}}})"


def board() -> Json:
    content: list[Panel | Row] = [
        Row("Golden sets"),
        *_scores(),
        *_runs(),
        Row("Shadows"),
        *_shadows(),
    ]
    says = "How versions score on their golden sets, and how far a shadow's answers agree with those that clients got."
    return dashboard("quality", "Quality", says, content, [ADAPTER, VERSION], marks("$adapter"))


def _scores() -> list[Panel]:
    return [
        Panel(
            "Golden score by version",
            "Mean score on the golden set, and where the mean of all cases like these lies with 95 % confidence (low, "
            "high). Two versions whose ranges overlap may be equally good: give the set more cases.",
            [Query(_SCORE, EACH), Query(_BOUNDS, EACH + " {{bound}}")],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
        Panel(
            "Golden score of what is live",
            "Of whichever version is live, on one and the same set. It falls: another version became live, or the base "
            "model or the judge under it changed. By more than 5 points within a day, an alert says so.",
            [Query("max by (adapter, set) (loradock_golden_live_score{adapter=~'$adapter'})", "{{adapter}} {{set}}")],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
        Panel(
            "Scores now",
            "Each version's score with its range, now. GET /v1/adapters/NAME/golden/results has every case.",
            [Query(f"label_replace({_SCORE}, 'bound', 'score', '', '') or {_BOUNDS}", now=True)],
            unit="percentunit",
            kind="table",
            quiet=True,
            width=24,
        ),
    ]


def _runs() -> list[Panel]:
    return [
        Panel(
            "Cases without a score",
            "Of the live version and the canary. It should fall to zero after a push: what stays has an error, or the "
            "engine has no time for it. The same for half an hour: an alert says so.",
            [Query(f"max by ({BY}) (loradock_golden_unscored_cases{{{CHOSEN}}})", EACH)],
            quiet=True,
        ),
        Panel(
            "Cases asked, by result",
            "In the last hour. error: the engine did not take the prompt, or the judge gave no grade.",
            [Query(counted("loradock_golden_cases_total", CHOSEN, "1h", f"{BY}, result"), EACH + " {{result}}")],
            quiet=True,
            decimals=0,
        ),
        Panel(
            "Since the last answer",
            "Time since a version answered a golden case. A live version is asked once per golden_interval (a day).",
            [Query(f"time() - max by ({BY}) (loradock_golden_last_run_timestamp_seconds{{{CHOSEN}}})", EACH)],
            unit="s",
            quiet=True,
        ),
        Panel(
            "Runs that failed",
            "In the last hour: the engine or the database gave an error, and the set is tried again.",
            [
                Query(
                    counted("loradock_golden_run_failures_total", 'adapter=~"$adapter"', "1h", "adapter"), "{{adapter}}"
                )
            ],
            quiet=True,
            decimals=0,
            levels=((None, "green"), (1, "red")),
        ),
    ]


def _shadows() -> list[Panel]:
    by = f"{BY}, sampling"
    return [
        Panel(
            "Agreement with the live version",
            "Mean over all requests compared. exact: the same tokens; prefix: the part up to the first other token; "
            "edit: the part that needs no edit. greedy requests are those at temperature 0; of sampled ones two "
            "answers of one version differ too.",
            [
                Query(
                    f"max by ({by}, measure) (loradock_shadow_agreement{{{CHOSEN}}})",
                    EACH + " {{sampling}} {{measure}}",
                )
            ],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
        Panel(
            "Length against the live version",
            "Mean of the tokens of a shadow's answer over those of the client's. 2: it says twice as much, and costs "
            "twice as much.",
            [Query(f"max by ({by}) (loradock_shadow_length_ratio{{{CHOSEN}}})", EACH + " {{sampling}}")],
            quiet=True,
        ),
        Panel(
            "Compared",
            "Answers a second that were compared. Few: raise the shadow's weight, or max_shadows.",
            [Query(rate("loradock_shadow_compared_total", CHOSEN, by), EACH + " {{sampling}}")],
            unit="reqps",
            quiet=True,
        ),
        Panel(
            "Judge's grades",
            "Mean grade of the client's answers (live) and of the shadow's, by the golden set's judge.",
            [Query(f"max by ({by}, answer) (loradock_shadow_grade{{{CHOSEN}}})", EACH + " {{sampling}} {{answer}}")],
            unit="percentunit",
            quiet=True,
            most=1,
        ),
    ]
