"""The report's style sheet, embedded in every report."""

from __future__ import annotations

STYLE = """\
:root { color-scheme: light; }
body { margin: 0; background: #fbfbfa; color: #1f2933;
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 71rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.05rem; margin: 0 0 .6rem; }
section { margin-top: 2.4rem; }
.set { margin-top: 4.5rem; border-top: 2px solid #cbd2d9; padding-top: 1.2rem; }
.set h2 { font-size: 1.4rem; }
.lead { font-size: 1.1rem; max-width: 50rem; color: #3e4c59; margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; background: #fff; font-variant-numeric: tabular-nums; }
th { text-align: right; vertical-align: bottom; font-size: .82rem; font-weight: 600; color: #52606d; padding: .5rem .7rem; }
td { text-align: right; padding: .42rem .7rem; border-top: 1px solid #e6e9ed; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #cbd2d9; }
tr.fixed td { font-weight: 600; }
tr.method td { color: #0b5f58; font-weight: 600; }
tr.beside td { color: #697886; }
tr.beside td:first-child { padding-left: 1.9rem; }
.caption { font-size: .85rem; color: #697886; max-width: 56rem; margin: .6rem 0 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; background: #fff; border: 1px solid #e6e9ed; border-radius: 6px; padding: 1rem 1.1rem; }
figure img { width: 100%; height: auto; display: block; }
section > figure { max-width: 36rem; }
.answers th, .answers td { text-align: left; white-space: normal; vertical-align: top; min-width: 6.5rem; }
.answers td { overflow-wrap: anywhere; }
.answers td:first-child { min-width: 15rem; }
.answers td.right { color: #0b5f58; }
.answers td.right::after { content: " \\2713"; }
.answers td.wrong { color: #7b8794; }
details { margin-top: .3rem; font-size: .85rem; color: #52606d; }
summary { cursor: pointer; color: #697886; }
ul { padding-left: 1.2rem; max-width: 56rem; margin: 0; }
li { margin: .25rem 0; overflow-wrap: anywhere; }
@media print { body { background: #fff; } main { padding: 0; } }
"""
