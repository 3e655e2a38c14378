#!/usr/bin/env bash
# Report that the tests fail on torch's nightly build: a warning on the run, its summary, and one
# open issue, which a later failure comments on. Usage: report_nightly.sh LOG, with RUN (the
# address of the run), GH_TOKEN and GH_REPO in the environment.
set -euo pipefail

title="The tests fail on torch's nightly build"
if [ -f "$1" ]; then
    last_lines=$(tail -n 30 "$1")
else
    last_lines="The environment was not built; the run has the log."
fi
text=$(printf '%s\n\n```\n%s\n```\n' "$RUN" "$last_lines")

echo "::warning title=torch nightly::$title"
printf '## %s\n\n%s\n' "$title" "$text" >> "$GITHUB_STEP_SUMMARY"

number=$(
    gh issue list --state open --search "in:title \"$title\"" \
        --json number --jq '.[0].number // empty'
)
if [ -n "$number" ]; then
    gh issue comment "$number" --body "$text"
else
    gh issue create --title "$title" --body "$text"
fi
