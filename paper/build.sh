#!/usr/bin/env bash
# Build paper/main.pdf; equal sources give equal bytes.
set -euo pipefail
cd "$(dirname "$0")"
if ! command -v latexmk >/dev/null || ! command -v pdflatex >/dev/null; then
  echo "no LaTeX here: apt-get install --no-install-recommends latexmk texlive-latex-recommended texlive-fonts-recommended texlive-latex-extra texlive-science texlive-pictures cm-super-minimal"
  exit 0
fi
SOURCE_DATE_EPOCH=1767225600  # a constant: the date in the PDF says nothing, its bytes stay the same
export SOURCE_DATE_EPOCH FORCE_SOURCE_DATE=1 TZ=UTC
latexmk -pdf -interaction=nonstopmode -halt-on-error -silent main.tex >/dev/null 2>&1 \
  || { grep -n -A3 '^!' main.log || tail -20 main.log; echo "paper/main.tex does not build; see paper/main.log"; exit 1; }
if grep -n 'undefined' main.log; then echo "paper/main.tex has undefined references"; exit 1; fi
echo "paper/main.pdf: $(sha256sum main.pdf | cut -c1-16)"
