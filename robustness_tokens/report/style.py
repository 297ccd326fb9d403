"""How the page of a report looks: light and dark, on a phone, on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2430; --muted: #566173; --line: #dde2e9; --head: #eef1f5;
  --accent: #1b4965; --pass: #17603a; --pass-back: #dff3e6; --fail: #9b1c1c; --fail-back: #fbe3e3;
  --none: #4a5568; --none-back: #e9edf2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --text: #e4e8ee; --muted: #9aa6b6; --line: #2e3744; --head: #222a35;
    --accent: #8ec5e8; --pass: #8fe0b0; --pass-back: #173626; --fail: #ffb0b0; --fail-back: #471d20;
    --none: #c0c9d6; --none-back: #2b3441;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 3rem 0 .75rem; letter-spacing: -.005em; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em; }
.muted, caption, figcaption { color: var(--muted); }
.lead { font-size: 1.05rem; }
.eyebrow {
  margin: 0 0 .4rem; color: var(--muted); font-size: .78rem; font-weight: 600; letter-spacing: .07em;
  text-transform: uppercase;
}

.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .9rem; margin: 1.5rem 0 0; }
.stat {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem;
}
.stat.strongest { border: 2px solid var(--accent); padding: calc(1rem - 1px) calc(1.1rem - 1px); }
.stat dt { font-weight: 650; line-height: 1.3; }
.stat dd { margin: 0; line-height: 1.4; font-size: .88rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.stat dd.value { margin: .25rem 0 .1rem; font-size: 2.1rem; line-height: 1.25; font-weight: 650; color: var(--text); }
.stat dd.who { margin-top: .5rem; }
.stat dd.value small { font-size: 1.1rem; font-weight: 500; color: var(--muted); }

.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.4; }
caption > span {
  display: inline-block; position: sticky; left: .85rem; max-width: min(46rem, calc(100vw - 4.5rem));
}
caption { text-align: left; padding: .75rem .85rem; font-size: .88rem; }
th, td { padding: .5rem .85rem; text-align: left; vertical-align: baseline; border-top: 1px solid var(--line); }
thead th { background: var(--head); font-size: .8rem; font-weight: 600; color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 600; }
.level th { background: var(--head); padding-top: .6rem; padding-bottom: .45rem; }
.num { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.value { font-weight: 600; padding-right: .3rem; }
td.interval { color: var(--muted); padding-left: .3rem; font-size: .85em; }
th.pair { text-align: right; white-space: nowrap; }
tbody th[scope=row] { font-weight: 500; min-width: 14rem; }
tr.strongest > * { border-top: 2px solid var(--accent); border-bottom: 2px solid var(--accent); }
tbody tr.strongest > th { font-weight: 700; }
tr.strongest details { font-weight: 400; }
.parameters { display: block; color: var(--muted); font-size: .8rem; font-weight: 400; max-width: 30rem; }

.checks td:last-child { min-width: 15rem; }
.checks th[scope=row] { min-width: 9rem; font-weight: 600; }
.found { display: block; font-weight: 500; }
.how { display: block; color: var(--muted); font-size: .85rem; }
.verdict {
  display: inline-block; white-space: nowrap; border-radius: 1rem; padding: .08rem .6rem; font-size: .82rem;
  font-weight: 650; border: 1px solid transparent;
}
.pass { color: var(--pass); background: var(--pass-back); }
.fail { color: var(--fail); background: var(--fail-back); border-color: currentColor; }
.none { color: var(--none); background: var(--none-back); }
.counts .verdict { white-space: normal; }
.counts { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0 0 1rem; padding: 0; list-style: none; }

details { margin-top: .3rem; }
main > details, section > details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--muted); font-size: .85rem; }
details ul { margin: .3rem 0 0; padding-left: 1.1rem; color: var(--muted); font-size: .8rem; font-weight: 400; }
details .scroll { margin-top: .6rem; }

.figures { display: grid; gap: 1.25rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
figure {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden;
  display: flex; flex-direction: column;
}
figure.wide { grid-column: 1 / -1; }
figure.alone img { max-width: min(100%, 40rem); }
figure .paper {
  flex: 1; display: grid; align-content: center; background: #ffffff; padding: .9rem; overflow-x: auto;
}
figure img { display: block; margin: 0 auto; max-width: 100%; height: auto; }
figcaption { padding: .8rem 1rem 1rem; font-size: .88rem; border-top: 1px solid var(--line); }
figcaption b { display: block; color: var(--text); font-size: .95rem; }

dl.facts { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.25rem; margin: 0 0 1rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; }
.limits { padding-left: 1.2rem; max-width: 46rem; }
.limits li { margin-bottom: .45rem; }

@media (max-width: 46rem) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .figures { grid-template-columns: minmax(0, 1fr); }
  th, td { padding: .45rem .6rem; }
  figure .paper { padding: .5rem; }
  figure.wide:not(.alone) img { max-width: none; width: 44rem; }
  .checks, .checks caption, .checks tbody { display: block; }
  .checks thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .checks tr {
    display: grid; grid-template-columns: 1.9rem 1fr auto; align-items: baseline; padding: .55rem .6rem;
    border-top: 1px solid var(--line);
  }
  .checks th, .checks td { border: 0; padding: 0; }
  .checks td:first-child { text-align: left; }
  .checks td:last-child { grid-column: 2 / -1; padding-top: .2rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .5rem; }
}
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --card: #ffffff; --text: #000000; --muted: #444444; --line: #bbbbbb; --head: #f0f0f0;
    --accent: #1b4965; --pass: #17603a; --pass-back: #ffffff; --fail: #9b1c1c; --fail-back: #ffffff;
    --none: #444444; --none-back: #ffffff;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  .verdict { border-color: currentColor; }
  figure, .stat, tr { break-inside: avoid; }
  h2, h3, .level { break-after: avoid; }
  thead { display: table-header-group; }
}
"""
