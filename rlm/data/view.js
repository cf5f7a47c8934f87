// Written by hand: what the page of `rlm view` does. A run is a tree of nodes; a node's items are nodes, or [kind, text] pairs.
// Text becomes text nodes, and nothing else.
'use strict'
const $ = id => document.getElementById(id)
const json = e => JSON.parse(e.textContent)
const el = (tag, cls, ...kids) => { const e = document.createElement(tag); if (cls) e.className = cls; e.append(...kids); return e }
const chain = (...parts) => new RegExp(parts.map(p => `(${p.source})`).join('|'), 'gm')

// Colours: a regular expression with a group for each class; what it matches is wrapped, never changed. Characters that would not be seen are named.
const unseen = /[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/
const words = w => new RegExp(`\\b(?:${w.replaceAll(' ', '|')})\\b`)
const quoted = /(?:\b[rbfuRBFU]{1,2})?(?:"""(?:\\[^]|[^\\])*?(?:"""|(?![^]))|'''(?:\\[^]|[^\\])*?(?:'''|(?![^]))|"(?:\\[^]|[^"\\\n])*"?|'(?:\\[^]|[^'\\\n])*'?)/
const python = chain(unseen, /#.*/, quoted, words('False None True and as assert async await break class continue def del elif else except finally for from global if import in is lambda match ' +
  'nonlocal not or pass raise return try while with yield'), /\b\d[\d_]*\.?\d*(?:[eE][+-]?\d+)?\b/, /\b[A-Za-z_]\w*(?=\()/)
const prose = chain(unseen, /(?!)/, /`[^`\n]+`/, /(?!)/, /(?!)/, /(?!)/, /\*\*[^*\n]+\*\*|^#{1,6} .*$/)
const plain = chain(unseen)
const classes = ['ctl', 'c', 's', 'w', 'n', 'f', 'b']
function paint(text, rule) {
  const out = []; let at = 0
  if (text.length > 200000) return [text]
  for (const m of text.matchAll(rule)) {
    const i = m.slice(1).findIndex(o => o !== undefined), e = el('span', classes[i], m[0])
    if (i == 0) e.dataset.name = 'U+' + m[0].codePointAt(0).toString(16).toUpperCase().padStart(4, '0')
    out.push(text.slice(at, m.index), e); at = m.index + m[0].length
  }
  return [...out, text.slice(at)]
}

// Nodes: a folded one has no body until it is opened
const asText = new Set(['text', 'question', 'answer', 'note', 'cut', 'role'])
const names = {out: 'Output', err: 'Error', msg: 'Message', vars: 'Variables', answer: 'Answer', question: 'Question'}
function leaf([kind, text]) {
  const flows = asText.has(kind), rule = kind == 'code' ? python : kind == 'text' ? prose : plain
  const e = el(flows ? 'div' : 'pre', flows ? 'text ' + kind : kind, ...paint(text, rule))
  if (kind == 'question' && text.length > 300) e.classList.add('long')
  if (names[kind]) { e.tabIndex = 0; e.setAttribute('role', 'group'); e.setAttribute('aria-label', names[kind]) }
  return e
}
function fold(node) {
  const error = node.error ? [el('span', 'error', ...paint(node.error, plain))] : []
  const parts = [el('span', 'title', ...paint(node.title, plain)), el('span', 'about', ...paint(node.about, plain)), el('span', 'sums', ...error, node.sums)]
  const d = el('details', node.kind, el('summary', '', ...parts))
  d.node = node
  d.addEventListener('toggle', () => { if (d.open) fill(d) })
  return d
}
const show = it => Array.isArray(it) ? leaf(it) : fold(it)
function fill(d) { if (!d.body) d.append(d.body = el('div', 'body', ...d.node.items.map(show))) }
function open(d) { fill(d); d.open = true }

// One run
let run
function load(i) {
  clearTimeout(rest)
  run = json(document.querySelectorAll('script.run')[i])
  document.title = run.title
  $('head').replaceChildren(...run.head.map(leaf))
  $('facts').replaceChildren(...run.facts.map(([k, v]) => el('div', '', el('dt', '', k), el('dd', '', ...paint(v, plain)))))
  $('turns').replaceChildren(...run.turns.map(fold))
  $('chart').replaceChildren(...['tokens', 'cost', 'seconds'].flatMap(chart))
  document.querySelectorAll('#runs button').forEach((b, j) => j == i ? b.setAttribute('aria-current', 'true') : b.removeAttribute('aria-current'))
  folded(false); search()
}
function go(d) { open(d); d.firstChild.focus(); d.firstChild.scrollIntoView({block: 'start'}) }
function folded(on) { $('fold').textContent = on ? 'Fold all' : 'Unfold all'; $('fold').setAttribute('aria-pressed', on) }

// The chart: a bar for a turn, or for as many as a bar has to stand for
const units = {tokens: v => v.toLocaleString('en'), cost: v => '$' + (v < .01 ? +v.toPrecision(2) : v.toFixed(4)), seconds: v => v.toFixed(1) + ' s'}
function svg(tag, attrs, ...kids) { const e = document.createElementNS('http://www.w3.org/2000/svg', tag); for (const k in attrs) e.setAttribute(k, attrs[k]); e.append(...kids); return e }
function chart(what) {
  const n = run.turns.length, step = Math.ceil(n / 200), bars = []
  for (let i = 0; i < n; i += step) {
    const some = run.turns.slice(i, i + step), vs = some.map(t => t[what]).filter(v => v != null)
    bars.push({i, last: i + some.length, v: vs.reduce((a, b) => a + b, 0), known: vs.length, failed: some.some(t => t.error)})
  }
  const sum = bars.reduce((a, b) => a + b.v, 0), top = Math.max(...bars.map(b => b.v))
  if (!top || n < 2) return []
  const draw = b => {
    const name = b.last - b.i > 1 ? `Turns ${b.i + 1} to ${b.last}` : `Turn ${b.last}`, x = b.i / step, h = Math.max(b.v / top * 40, b.known ? .7 : 0)
    const g = svg('g', b.failed ? {class: 'failed'} : {}, svg('title', {}, `${name}: ${b.known ? units[what](b.v) : 'not known'}`),
      svg('rect', {class: 'back', x, y: 0, width: 1, height: 40}), svg('rect', {class: 'bar-fill', x: x + .1, y: 40 - h, width: .8, height: h}))
    g.addEventListener('click', () => go($('turns').children[b.i]))
    return g
  }
  const about = `${what} by turn: ${units[what](sum)} in all, at most ${units[what](top)}`
  const frame = {viewBox: `0 0 ${Math.max(bars.length, 30)} 40`, preserveAspectRatio: 'none', role: 'img', 'aria-label': about}
  return [el('span', '', what, el('br'), units[what](sum)), svg('svg', frame, ...bars.map(draw))]
}

// Search goes through the data, so that what was never opened is found too
const most = 10000
let hits = [], now = -1, asked = ''
function find(items, re, path) {
  items.forEach((it, i) => {
    if (hits.length >= most) return
    const p = [...path, i]
    if (!Array.isArray(it)) return find(it.items, re, p)
    for (const m of it[1].matchAll(re)) if (hits.push({path: p, at: m.index, n: m[0].length}) >= most) return
  })
}
function search() {
  const q = asked = $('q').value; hits = []; now = -1
  if (self.Highlight) CSS.highlights.clear()
  if (q) { const re = new RegExp(q.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&'), 'gi'); find(run.head, re, [0]); find(run.turns, re, [1]) }
  $('prev').disabled = $('next').disabled = !hits.length
  count()
}
function count() {
  const all = hits.length >= most ? most.toLocaleString('en') + '+' : hits.length.toLocaleString('en')
  $('hits').textContent = !$('q').value ? '' : now < 0 ? all + (hits.length == 1 ? ' hit' : ' hits') : `${now + 1} of ${all}`
}
function element(path) {
  let e, box = [$('head'), $('turns')][path[0]]
  for (const i of path.slice(1)) { e = box.children[i]; if (e.node) { open(e); box = e.body } }
  return e
}
function range(e, {at, n}) {
  const r = document.createRange(), walk = document.createTreeWalker(e, NodeFilter.SHOW_TEXT)
  for (let t, left = at, started = false; t = walk.nextNode(); left -= t.length) {
    if (!started && left < t.length) { r.setStart(t, left); started = true; left += n }
    if (started && left <= t.length) { r.setEnd(t, left); break }
  }
  return r
}
function step(by) {
  if (!hits.length) return
  now = now < 0 && by < 0 ? hits.length - 1 : (now + by + hits.length) % hits.length
  const hit = hits[now], e = element(hit.path), r = range(e, hit), box = () => r.getBoundingClientRect()
  if (self.Highlight) {
    const near = hits.slice(Math.max(now - 200, 0), now + 200).filter(o => o != hit && o.path.join() == hit.path.join())
    CSS.highlights.set('hits', new Highlight(...near.map(o => range(e, o)))); CSS.highlights.set('hit', new Highlight(r))
    CSS.highlights.get('hit').priority = 1
  }
  e.scrollIntoView({block: 'nearest'})
  e.scrollTop += box().top - e.getBoundingClientRect().top - e.clientHeight / 2
  scrollBy(0, box().top - innerHeight / 2)
  count()
}

// Hands
let timer, rest
function all(todo, on) { // A hundred at a time, so that the page stays alive
  clearTimeout(rest)
  for (const d of todo.splice(0, 100)) on ? open(d) : d.open = false
  if (todo.length) rest = setTimeout(all, 0, todo, on)
}
$('q').addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(() => { if ($('q').value != asked) search() }, 150) })
$('q').addEventListener('keydown', e => {
  if (e.key == 'Enter') { if ($('q').value != asked) search(); step(e.shiftKey ? -1 : 1) }
  if (e.key == 'Escape') { $('q').value = ''; search(); $('q').blur() }
})
$('next').addEventListener('click', () => step(1))
$('prev').addEventListener('click', () => step(-1))
$('fold').addEventListener('click', () => {
  const on = $('fold').getAttribute('aria-pressed') == 'false'
  all([...$('turns').children], on)
  folded(on)
})
$('theme').addEventListener('click', () => {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme == 'dark' : matchMedia('(prefers-color-scheme: dark)').matches
  document.documentElement.dataset.theme = dark ? 'light' : 'dark'
})
function walk(by) {
  const seen = [...document.querySelectorAll('#turns summary')].filter(s => !s.parentElement.parentElement.closest('details:not([open])'))
  const next = seen[seen.indexOf(document.activeElement) + by] ?? (by > 0 ? seen[0] : seen.at(-1))
  if (next) { next.focus({preventScroll: true}); next.scrollIntoView({block: 'nearest'}) }
}
document.addEventListener('keydown', e => {
  if (e.target.id == 'q' || e.ctrlKey || e.metaKey || e.altKey) return
  const act = {j: () => walk(1), k: () => walk(-1), n: () => step(1), N: () => step(-1), '/': () => { $('q').focus(); $('q').select() }}[e.key]
  if (act) { e.preventDefault(); act() }
})
const index = json($('index'))
if (index.length > 1) {
  $('runs').hidden = false
  $('runs').append(...index.map(([title, about], i) => {
    const b = el('button', '', ...paint(title, plain), el('small', '', about))
    b.addEventListener('click', () => load(i))
    return b
  }))
}
load(0)
