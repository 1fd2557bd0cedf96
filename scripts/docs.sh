#!/usr/bin/env bash
# Builds the pages of docs/ into site/ with mkdocs-material; a dead link or any other warning fails.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment docs
cd "$ROOT"
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet || fail "mkdocs found the above"
echo "site/index.html"
