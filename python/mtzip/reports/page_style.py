"""The style sheet of the page that shows a zip: light and dark, on a screen of any width and on paper."""

_LIGHT = ("#e39a3b", "#6aa84f", "#b05fa0", "#c8553d", "#4f9e97", "#8a7fc7", "#a58a4a", "#7a8794")
_DARK = ("#f0b35e", "#8ccf70", "#d28cc4", "#ec8570", "#74c7bf", "#aca2ea", "#cdb06c", "#9fadbb")

TASKS = len(_LIGHT)  # colours of private parts, a task each in turn

_COLOURS = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --card: #fff; --ink: #1d2430; --soft: #5d6675; --line: #e2e4e8;
  --shared: #1f77a8; --before: #d5d9df; LIGHT
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181f; --card: #1b212a; --ink: #e6e9ee; --soft: #98a2b1; --line: #2d3541;
    --shared: #4aa8dc; --before: #3a4452; DARK
  }
}
"""

_RULES = """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 4px; }
p { margin: 0 0 12px; }
.soft, .note { color: var(--soft); }
.note { font-size: 13px; max-width: 84ch; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 20px 22px; margin-top: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-top: 20px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; line-height: 1.35; display: block; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 12px; font-size: 13px; color: var(--soft); }
.legend i, i.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.legend i, i.key { vertical-align: -1px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 500; color: var(--soft); font-size: 13px; white-space: nowrap; }
th, td { padding: 3px 8px; border-bottom: 1px solid var(--line); vertical-align: middle; }
td { text-align: right; white-space: nowrap; }
tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
th.left, td.left { text-align: left; }
th.middle { text-align: center; }
td.picture { width: 44%; min-width: 240px; }
td.gauge { width: 11%; min-width: 72px; }
td.total { font-weight: 600; }
.name { font-family: ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; font-size: 13px; }
svg { display: block; width: 100%; }
svg.boxes { height: 16px; }
svg.bar { height: 9px; }
svg.stacked { height: 26px; margin: 10px 0 14px; }
svg.curves { height: auto; max-height: 340px; }
.many { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 10px; align-items: center; }
.many span { overflow: hidden; text-overflow: ellipsis; }
.ends { display: grid; grid-template-columns: 1fr auto 1fr; }
.ends span:last-child { text-align: right; }
.ends span { overflow: hidden; text-overflow: ellipsis; }
.absent { color: var(--soft); text-align: center; }
.shared { fill: var(--shared); background: var(--shared); }
.before { fill: var(--before); background: var(--before); }
.grid { stroke: var(--line); stroke-width: 1; }
.tick { fill: var(--soft); font-size: 12px; }
.line { stroke-width: 1.8; stroke-linejoin: round; }
dl { margin: 8px 0 0; }
dt { font-weight: 600; margin-top: 10px; }
dd { margin: 2px 0 0; overflow-wrap: anywhere; }
dd .name { margin-right: 10px; display: inline-block; }
footer { color: var(--soft); font-size: 13px; margin-top: 24px; }
@media print { section, .tile { break-inside: avoid-page; } }
"""


def _variables(colours: tuple[str, ...]) -> str:
    return " ".join(f"--t{at}: {colour};" for at, colour in enumerate(colours))


STYLE = (
    _COLOURS.replace("LIGHT", _variables(_LIGHT)).replace("DARK", _variables(_DARK))
    + _RULES
    + "".join(f".t{at} {{ fill: var(--t{at}); background: var(--t{at}); }}\n" for at in range(TASKS))
    + "".join(f".line.t{at} {{ fill: none; stroke: var(--t{at}); }}\n" for at in range(TASKS))
)
