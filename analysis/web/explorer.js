// BlockDance Explorer: the page, in one file without a build step. The app and the static site both use it.
//
//   BlockDance.mount(element, {atlas: "atlas/", plotly: "plotly.min.js", live: null, settings: {...}})
//
// A comparison is found in the atlas (computed ahead), or asked of `live` (the app). Text that a visitor typed reaches the
// page through textContent, value and canvas only.

(function () {
"use strict";

// ---------------------------------------------------------------- schedules: the arithmetic of blockdance/schedule.py

const MIN_STEPS = 4;
const KIND_NAMES = {f: "full", c: "cache", r: "reuse"};
const KIND_COLOURS = {f: "#9aa5b1", c: "#2f6fde", r: "#f28c28"};

/** Like Python's round(): halves go to the even neighbour. */
function roundHalfEven(x) {
  const floor = Math.floor(x), rest = x - floor;
  return rest === 0.5 ? floor + (floor % 2) : Math.round(x);
}

function fixedSchedule({interval, start, end}, steps) {
  const first = roundHalfEven(start * steps), stop = roundHalfEven(end * steps);
  if (interval === 1 || steps < MIN_STEPS || stop - first < 2) return "f".repeat(steps);
  return Array.from({length: steps}, (_, step) =>
    step < first || step >= stop ? "f" : (step - first) % interval ? "r" : "c").join("");
}

/** A schedule must cache before it reuses. */
function isValid(kinds, steps) {
  return kinds.length === steps && /^[fcr]+$/.test(kinds) && !/^[^c]*r/.test(kinds);
}

function blocksRun(kinds, cutoff, blocks) {
  return [...kinds].reduce((sum, kind) => sum + (kind === "r" ? blocks - cutoff - 1 : blocks), 0);
}

function idealSpeedup(kinds, cutoff, blocks) {
  return blocks * kinds.length / blocksRun(kinds, cutoff, blocks);
}

/** The cache step that each step reuses, or null. */
function reusedFrom(kinds) {
  let last = null;
  return [...kinds].map((kind, step) => { if (kind === "c") last = step; return kind === "r" ? last : null; });
}

/** A click on a step: reuse and cache change places; a first cache step goes back to full, since nothing could be reused. */
function toggled(kinds, step) {
  const before = kinds.slice(0, step).includes("c");
  const next = {r: "c", c: before ? "r" : "f", f: before ? "r" : "c"}[kinds[step]];
  const changed = kinds.slice(0, step) + next + kinds.slice(step + 1);
  return isValid(changed, kinds.length) ? changed : null;
}

const storageOf = (run) => run.storage || "latest";
/** Without reuse, neither the cutoff nor the storage matters. */
const sameRun = (a, b) => a.schedule === b.schedule
  && (!a.schedule.includes("r") || a.cutoff_block === b.cutoff_block && storageOf(a) === storageOf(b));

// ---------------------------------------------------------------- small helpers

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const times = (value) => `${value.toFixed(2)}×`;
const tiny = (value) => Number(value.toPrecision(1)).toFixed(Math.max(2, -Math.floor(Math.log10(value))));
const small = (value) => value === 0 ? "0" : value < 0.001 ? value.toFixed(5) : value.toFixed(4);
const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** An element with properties and children; strings become text. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role" || name.startsWith("data-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function debounced(wait, action) {
  let timer;
  return (...values) => { clearTimeout(timer); timer = setTimeout(() => action(...values), wait); };
}

function download(name, blob) {
  const link = h("a", {href: URL.createObjectURL(blob), download: name});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const images = new Map();
const MOST_DECISIONS = 200;
const MOST_IMAGES = 200;
/** The decoded image of an address; live ones are forgotten when there are many. */
function image(src) {
  if (!images.has(src)) {
    const loading = new Image();
    loading.src = src;
    images.set(src, loading.decode().then(() => loading));
    if (images.size > MOST_IMAGES) images.delete(images.keys().next().value);
  }
  return images.get(src);
}

const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"]
  .map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
function viridis(fraction) {
  const place = clamp(fraction, 0, 1) * (VIRIDIS.length - 1), low = Math.min(VIRIDIS.length - 2, Math.floor(place));
  return `rgb(${VIRIDIS[low].map((from, c) => Math.round(from + (VIRIDIS[low + 1][c] - from) * (place - low))).join()})`;
}

// ---------------------------------------------------------------- the page's fixed parts

const SKELETON = `
<header class="bd-header">
  <div><h1>BlockDance Explorer</h1>
  <p>One prompt, drawn twice from <b>the same random noise</b>: by the plain sampler, and by <b>BlockDance</b>, which on some steps skips the
  first blocks of the transformer and reuses what they put out a step before.</p></div>
  <div class="bd-buttons"><button data-do="tour" data-part="tour" class="primary">Take the tour</button><button data-do="link">Copy link</button></div>
</header>
<div class="bd-columns">
<aside class="bd-controls">
  <form data-part="prompt"><label for="bd-prompt">Prompt</label>
    <div class="bd-line"><input id="bd-prompt" autocomplete="off" maxlength="300"><button data-live class="primary">Draw</button></div>
    <div class="bd-styles" role="group" aria-label="Style" data-live hidden></div>
    <button data-do="more" data-live class="bd-more" hidden>More subjects, three styles</button>
    <div class="bd-chips" role="group" aria-label="Examples"></div></form>
  <div class="bd-status"><p role="status" aria-live="polite"></p><progress max="1" value="0" hidden></progress>
    <button data-do="stop" data-live hidden>Stop</button></div>
  <div data-part="sliders" class="bd-sliders">
    <label>Reuse interval N <output></output><input type="range" name="interval" min="1" max="6" step="1">
      <small>One cache step, then N − 1 reuse steps. 1 never reuses.</small></label>
    <label>Cutoff block i <output></output><input type="range" name="cutoff" min="0" step="1">
      <small>Blocks 0 to i are skipped on reuse steps.</small></label>
    <label>Window start <output></output><input type="range" name="start" min="0" max="1" step="0.01">
      <small>Reuse begins at this fraction of the steps.</small></label>
    <label>Window end <output></output><input type="range" name="end" min="0" max="1" step="0.01"></label>
    <label data-live>A reuse step starts from <select name="storage">
      <option value="latest">the stored output (the paper's)</option><option value="extrapolated">the last two, continued by a line</option></select></label>
    <p class="bd-edited" hidden><span></span> <button data-do="unedit">Back to the sliders</button></p>
  </div>
  <form data-part="planner" data-live class="bd-planner"><label for="bd-target">Or let the planner choose, for a speedup of</label>
    <div class="bd-line"><input id="bd-target" type="number" value="1.5" min="1.05" step="0.05" required><button>Plan</button></div>
    <p class="bd-note" role="status"></p></form>
  <div data-part="ada" data-live class="bd-ada"><label><input type="checkbox" name="ada"> Or let Ada decide, looking at this picture</label>
    <label>Wanted share of reuse steps <output></output><input type="range" name="saving" min="0.2" max="0.8" step="0.05"></label>
    <p class="bd-note" role="status"></p></div>
  <details data-part="sampling" data-live class="bd-sampling"><summary>Model and sampling</summary>
    <label>Model <select name="model"></select></label>
    <label>Seed <input type="number" name="seed" min="0" max="4294967295" step="1"></label>
    <label>Steps <input type="number" name="steps" min="1" max="100" step="1"></label>
    <label>Guidance <input type="number" name="guidance" min="1" max="20" step="0.5"></label>
    <label>Sampler <select name="sampler"></select></label></details>
  <details data-part="words" class="bd-words" hidden><summary>Words the model knows</summary><p></p></details>
</aside>
<main class="bd-main">
  <section data-part="pictures" class="bd-pictures" aria-label="Pictures">
    <figure><canvas data-picture="baseline"></canvas><figcaption>Baseline</figcaption></figure>
    <figure><canvas data-picture="variant"></canvas><figcaption>BlockDance</figcaption></figure>
    <figure><canvas data-picture="control"></canvas><figcaption>Fewer steps</figcaption></figure>
    <figure><canvas data-picture="both" tabindex="0" role="slider" aria-label="Wipe between baseline and BlockDance"
      aria-valuemin="0" aria-valuemax="100"></canvas><figcaption class="bd-modes" role="group" aria-label="Compare by"></figcaption></figure>
    <div class="bd-scrubber"><button data-do="play" aria-label="Play the steps"><i></i></button>
      <input type="range" name="step" min="0" step="1" aria-label="Step shown"><output></output></div>
  </section>
  <section data-part="numbers" class="bd-numbers" aria-label="Numbers"><div></div><button data-do="measure" data-live>Measure properly</button></section>
  <section data-part="map" class="bd-map"><div class="bd-line"><h2>Where features repeat</h2><div class="bd-scales" role="group" aria-label="Colour scale"></div></div>
    <p class="bd-note">Cosine similarity of each block's output with its own output one step earlier, in the plain run; bright means it repeats.
    Hatched cells are reused, never computed. <b>Drag</b> the orange line or the window's edges, <b>click</b> a column to pin its step, click the
    band below to turn a step from cache to reuse.</p>
    <div class="bd-canvas"><canvas data-map tabindex="0" role="application"></canvas><div class="bd-tip" hidden></div></div>
    <p class="bd-plan" aria-live="polite"></p>
    <details class="bd-table"><summary>The map as a table</summary><div></div></details></section>
  <section data-part="features" class="bd-features"><h2>What the blocks hold</h2>
    <p class="bd-note">The first three principal components of a block's output, as red, green and blue, at <b data-step></b>. Structure settles
    early; texture is made in the deep blocks (the paper's Fig. 3).</p><div class="bd-row"></div></section>
  <section data-part="pair" data-live class="bd-pair"><h2>Two pictures, two schedules</h2>
    <p class="bd-note">Ada looks at the latent once, after 40 % of the steps, and decides for every step that remains: cache (blue) or reuse (orange). The line is its
    probability of a cache step. Simple pictures may reuse more than complex ones at the same wish.</p>
    <form class="bd-line"><input name="simple" aria-label="A simple prompt" maxlength="300"><input name="complex" aria-label="A complex prompt" maxlength="300"><button>Let Ada draw both</button></form>
    <div class="bd-row"></div></section>
  <section data-part="strip" class="bd-strip"><h2>The same, with N = 1, 2, 3, 4</h2><div class="bd-row"></div></section>
  <section data-part="tradeoff" class="bd-tradeoff"><h2>Trade-off</h2>
    <p class="bd-note">Each dot is a run of this prompt: speedup against difference from the baseline, lower is closer. The line joins the best. Click a dot to
    load it. Where the control, fewer steps without any cache, lies lower, it wins.</p><div data-plot="tradeoff"></div>
    <details class="bd-dots"><summary>The dots as a list</summary><div></div></details>
    <div class="bd-compared" hidden><div class="bd-line"><h2>Against what you would pick instead</h2><div class="bd-counts" role="group" aria-label="Steps"></div></div>
    <p class="bd-note"></p><div data-plot="compared"></div><ul class="bd-note"></ul></div></section>
  <section data-part="analysis" class="bd-analysis"><h2>Step by step, block by block</h2>
    <div class="bd-two"><div data-plot="steps"></div><div data-plot="blocks"></div></div></section>
  <section data-part="export" class="bd-export"><h2>Take it away</h2><div class="bd-buttons">
    <button data-do="card">Comparison card (PNG)</button><button data-do="csv">Similarity (CSV)</button><button data-do="json">Run (JSON)</button>
    <button data-do="animate" data-live>Both samplers (GIF)</button><button data-do="python">Copy Python</button></div></section>
  <section data-part="how" class="bd-how"><details><summary>How it works, and where it fails</summary>
    <p>A diffusion transformer removes noise in steps, and in each step the picture goes through all L blocks. Once the structure has settled, the output
    h<sub>i</sub> of a shallow or middle block hardly differs from the step before. So inside a window of the run, steps form groups of N: one <b>cache
    step</b>, on which all blocks run and h<sub>i</sub> is stored, and N − 1 <b>reuse steps</b>, which start from it:</p>
    <math display="block"><mrow><msub><mi>ε</mi><mi>t</mi></msub><mo>=</mo><mi>head</mi><mo>(</mo><msub><mi>B</mi><mrow><mi>L</mi><mo>−</mo><mn>1</mn></mrow></msub><mo>∘</mo><mo>…</mo><mo>∘</mo>
    <msub><mi>B</mi><mrow><mi>i</mi><mo>+</mo><mn>1</mn></mrow></msub><mo>)</mo><mo>(</mo><msubsup><mi>h</mi><mi>i</mi><mi>cache</mi></msubsup><mo>,</mo><mi>t</mi><mo>)</mo></mrow></math>
    <p>With a share w of the steps in the window and a share s = (i + 1)/L of the blocks skipped, the cost model gives</p>
    <math display="block"><mrow><mi>speedup</mi><mo>=</mo><mfrac><mn>1</mn><mrow><mn>1</mn><mo>−</mo><mi>w</mi><mo>(</mo><mn>1</mn><mo>−</mo><mn>1</mn><mo>/</mo><mi>N</mi><mo>)</mo><mi>s</mi></mrow></mfrac></mrow></math>
    <p>The page counts blocks exactly; that is the <i>ideal</i>. What is <i>measured</i> also pays for everything outside the blocks.</p>
    <p><b>It fails</b> early in the run: the paper (PixArt at full size) finds that reuse before 40 % of the steps leaves structural artefacts. Early
    outputs may look alike, as the map of the model in the box shows, where the last steps differ most. But a reuse step does not read the
    current latent, just while the structure is decided, and every later step carries the error on: see the difference step by step.
    It also fails with few steps (below four nothing is reused) and with samplers that add noise on every step.
    Fewer steps are a strong rival: see the trade-off. The method is that of <a href="https://arxiv.org/abs/2503.15927" rel="noopener">BlockDance (Zhang et al., CVPR 2025)</a>; its
    authors have no part in this page.</p></details></section>
</main></div>
<div class="bd-notices" role="alert"></div>
<aside class="bd-tour" role="dialog" aria-label="Tour" tabindex="-1" hidden></aside>`;

const MODES = {wipe: "wipe", flip: "flip", difference: "difference ×8"};
const STOP_PATIENCE_MS = 1500; // until an order is placed though nobody said that the last one is stopped
const PAIR = ["sleepy face", "articulated lorry"]; // held-out prompts, on which the policy's schedules differ much
const MOST_SCENES = 40; // live ones kept; of each a few hundred kilobytes
const NOT_SHIPPED = "Not among the shipped comparisons: this site has no model to run. " +
  "N = 2, 3, 4 with cutoff 3, 6, 9 or 12, and the window from 0.40 to 0.95 or from 0 to 1, are.";
const WEAK_YARDSTICK = " Another seed is a weak yardstick here: the model memorises, and two seeds often look alike.";
const MORE = "demo-styles"; // the model in the box that knows more
const MOST_LETTERS = 300; // of a prompt
const HANDLE_PX = 76; // of the cutoff, on the map
const BAR_PX = 90; // the longest bar of an LPIPS
const SCHEDULERS = {DDIM: "DDIMScheduler", "DPM-Solver++": "DPMSolverMultistepScheduler", Heun: "HeunDiscreteScheduler"}; // of diffusers
const GRID = "rgba(128, 128, 128, 0.25)"; // of the plots
const ABLATION = /-(quadratic|residual|fewer|mask)$/;
const SCALES = {cosine: "cosine", log: "log(1 − cos)", block: "per block"};
const DEFAULTS = {
  request: {prompt: "red apple", seed: 0, steps: 30, guidance: 4, sampler: "DDIM"}, model: "demo",
  config: {interval: 2, cutoff: 9, start: 0.4, end: 0.95},
};

// ---------------------------------------------------------------- the explorer

class Explorer {
  constructor(root, {atlas, plotly, live = null, settings = {}}) {
    Object.assign(this, {root, atlas, plotly, live, settings});
    root.classList.add("bd");
    root.innerHTML = SKELETON;
    this.scenes = new Map();
    this.apart = new Map();
    this.decisions = new Map();
    this.tried = [];
    this.shipped = [];
    this.state = {...structuredClone(DEFAULTS), ...structuredClone(settings.defaults || {}),
                  edited: null, ada: false, saving: 0.5, storage: "latest", pinned: null, hover: null, scale: "cosine", mode: "wipe", wipe: 0.5, flipped: false};
    this.blocks = settings.num_blocks || 14;
    this.vocabularies = {[this.state.model]: settings}; // known_words, styles and examples, by model
    this.waiting = this.next = null; // the order that is waited for, and one that waits until the last is stopped
    this.ask = debounced(120, () => this.askNow());
    this.decideSoon = debounced(120, () => this.decideNow());
    this.drawPlots = debounced(150, () => this.drawPlotsNow());
    this.saveUrl = debounced(250, () => this.saveUrlNow());
    this.build();
    this.start();
  }

  $(selector) { return this.root.querySelector(selector); }
  all(selector) { return [...this.root.querySelectorAll(selector)]; }

  // ------------------------------------------------------------ what is shown

  get kinds() { return this.state.edited || fixedSchedule(this.state.config, this.state.request.steps); }
  get cutoff() { return this.state.config.cutoff; }
  get ideal() { return idealSpeedup(this.kinds, this.cutoff, this.blocks); }
  /** What is known of the request. Shipped figures of another perceptual distance than the app's are never mixed with its own. */
  get scene() {
    const scene = this.scenes.get(this.sceneKey()), own = this.apart.get(this.sceneKey());
    return scene && this.runOf(scene) || !own ? scene : own;
  }
  get step() { return this.state.hover ?? this.state.pinned; }

  sceneKey(request = this.state.request, model = this.state.model) {
    return JSON.stringify([model, request.prompt, request.seed, request.steps, request.guidance, request.sampler]);
  }

  /** The run of a scene with this schedule; one that reuses nothing is the baseline itself, bit for bit. */
  runOf(scene, kinds = this.kinds, cutoff = this.cutoff, storage = this.state.storage) {
    if (!scene || !scene.baseline) return null;
    if (!kinds.includes("r")) {
      const all = scene.num_blocks * kinds.length;
      return {schedule: kinds, cutoff_block: cutoff, storage, picture: scene.baseline.picture, previews: scene.baseline.previews, lpips: 0, ssim: 1,
              psnr: null, speedup_ideal: 1, speedup_measured: null, block_evaluations: all, baseline_block_evaluations: all, cache_bytes: 0,
              step_difference: Array(kinds.length).fill(0)};
    }
    return scene.runs.find((run) => sameRun(run, {schedule: kinds, cutoff_block: cutoff, storage})) || null;
  }

  /** The control that costs about what the run costs. */
  controlOf(scene, speedup = this.ideal) {
    const far = (control) => Math.abs(Math.log(control.speedup_ideal / speedup));
    return scene && scene.controls.length ? scene.controls.reduce((best, next) => far(next) < far(best) ? next : best) : null;
  }

  // ------------------------------------------------------------ data comes in

  async start() {
    this.readUrl();
    this.render();
    try {
      const answer = await fetch(`${this.atlas}manifest.json`);
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      this.openAtlas(await answer.json());
    } catch (error) {
      this.notice(`The shipped comparisons could not be loaded (${error.message}).`);
    }
    if (this.addressed) { this.choose(this.addressed.get("model")); return; }
    this.update();
    if (!calm() && this.runOf(this.scene)) this.play();
  }

  openAtlas(manifest) {
    this.manifest = manifest;
    const at = (ref) => ref && {...ref, src: this.atlas + ref.src};
    for (const scene of manifest.scenes) {
      for (const run of [scene.baseline, ...scene.runs, ...scene.controls]) {
        run.picture = at(run.picture);
        run.previews = at(run.previews);
      }
      for (const block of Object.keys(scene.features?.blocks || {})) scene.features.blocks[block] = at(scene.features.blocks[block]);
      scene.shipped = true;
      this.scenes.set(this.sceneKey(scene.request, "demo"), scene);
      this.shipped.push(scene);
    }
    this.$(".bd-chips").replaceChildren(...this.shipped.map(({request, num_blocks}) =>
      h("button", {type: "button", "data-key": this.sceneKey(request, "demo"), onclick: () => {
        this.blocks = num_blocks;
        this.set({model: "demo", request: {...request}, pinned: null, edited: null});
      }}, [request.prompt, request.seed && `seed ${request.seed}`, request.steps !== 30 && `${request.steps} steps`,
           request.guidance !== 4 && `guidance ${request.guidance}`].filter(Boolean).join(", "))));
  }

  /** News of a live run: {key, phase, progress, scene?, error?, unknown_words?, nearest_words?}. */
  receive(news) {
    if (news.stopped) this.placeNext();
    if (news.scene) this.addScene(news.scene_key, news.scene);
    if (news.key && news.key === this.waiting?.key) {
      if (news.error || news.phase === "done") this.waiting = null;
      else Object.assign(this.waiting, {phase: news.phase, progress: news.progress});
    }
    if (news.unknown_words?.length) {
      const near = (word) => news.nearest_words[word].length ? ` (near it: ${news.nearest_words[word].join(", ")})` : "";
      const words = news.unknown_words.map((word) => word + near(word));
      this.notice(`Words the model does not know, and draws as if they were not there: ${words.join(", ")}.`);
    }
    if (news.chosen) this.useModel(news.chosen);
    if (this.addressed && (news.chosen || news.error)) this.readRest();
    if (news.planned) this.usePlan(news.planned);
    if (news.decided) this.useDecisions(news.scene_key, news.decided);
    if (news.animation) download("blockdance.gif", dataBlob(news.animation));
    if (news.error && news.model) this.state.model = news.model;
    this.render();
  }

  addScene(key, scene) {
    if (!scene.size) { // it tells how long a run took, and no more
      for (const known of [this.scenes.get(key), this.apart.get(key)]) if (known) this.merge(known, scene);
      return;
    }
    const mixes = !this.scenes.get(key)?.shipped || this.manifest.lpips_name === this.settings.lpips_name;
    const scenes = mixes ? this.scenes : this.apart;
    if (scenes.has(key)) this.merge(scenes.get(key), scene); else scenes.set(key, scene);
    if (this.scenes.size > MOST_SCENES + this.shipped.length) this.forgetOldest();
  }

  merge(known, scene) {
    for (const part of ["baseline", "map", "features", "yardsticks"]) known[part] ||= scene[part];
    if (!known.baseline.previews) known.baseline = scene.baseline || known.baseline;
    for (const list of ["runs", "controls"]) for (const fresh of scene[list]) {
      const old = known[list].find((old) => list === "controls" ? old.steps === fresh.steps : sameRun(old, fresh));
      if (!old) { if (fresh.picture) known[list].push(fresh); }
      else if (fresh.rounds > old.rounds) Object.assign(old, fresh, {picture: old.picture, previews: old.previews || fresh.previews});
      else old.previews ||= fresh.previews;
    }
  }

  forgetOldest() {
    const live = [...this.scenes].find(([key, scene]) => !scene.shipped && key !== this.sceneKey());
    if (live) this.scenes.delete(live[0]);
  }

  // ------------------------------------------------------------ the visitor acts

  /** Change what is shown; the arithmetic follows at once, the picture when it is there. */
  set(change) {
    const {request, config} = this.state;
    const resetsEdit = (change.config && ["interval", "start", "end"].some((name) => change.config[name] !== undefined && change.config[name] !== config[name]))
      || (change.request && change.request.steps !== undefined && change.request.steps !== request.steps);
    Object.assign(this.state, change, {request: {...request, ...change.request}, config: {...config, ...change.config}});
    if (resetsEdit && change.edited === undefined) this.state.edited = null;
    const byHand = resetsEdit || [change.edited, change.config?.cutoff, change.storage].some((value) => value !== undefined);
    if (change.ada === undefined && byHand && !change.request) this.state.ada = false;
    if (this.state.model !== "demo") this.state.ada = false; // no policy for others
    const {config: now} = this.state;
    if (now.start > now.end) { if (change.config?.end === undefined) now.end = now.start; else now.start = now.end; }
    now.cutoff = clamp(now.cutoff, 0, this.blocks - 2);
    if (this.state.pinned !== null) this.state.pinned = clamp(this.state.pinned, 0, this.state.request.steps - 1);
    this.update();
  }

  update() {
    this.stopped = false;
    this.render();
    this.saveUrl();
    if (this.state.ada && this.live && !this.decision) { this.decideSoon(); return; }
    const run = this.runOf(this.scene);
    if (run) this.remember(run);
    if (!run || (this.live && !this.scene.map)) this.ask();
  }

  remember(run) {
    const dot = {key: this.sceneKey(), schedule: run.schedule, cutoff_block: run.cutoff_block, storage: run.storage};
    if (!this.tried.some((old) => old.key === dot.key && sameRun(old, dot))) this.tried.push(dot);
  }

  askNow() {
    if (this.runOf(this.scene) && this.scene.map) return;
    if (!this.live) { this.render(); return; }
    if (!this.state.request.prompt.trim()) { this.notice("Type a prompt, or choose an example."); return; }
    this.order("run", `${this.sceneKey()}|${this.kinds}/${this.cutoff}/${this.state.storage}`);
  }

  /** Ask the app for what is shown; the newest order is the one waited for. */
  order(what, key, more = {}) {
    if (this.waiting?.key === key) return;
    const {request, model, storage} = this.state, before = this.waiting;
    const order = {key, scene_key: this.sceneKey(), request, model, kinds: this.kinds, cutoff_block: this.cutoff, storage, ...more};
    this.waiting = {what, key, phase: "waiting for the model", progress: 0};
    this.stopped = false;
    if (this.next) this.next = [what, order];
    else if (before) this.stopFor(before.what, [what, order]);
    else this.live(what, order);
    this.render();
  }

  /** Stop what runs, and only then place the next order, which might be stopped with it. */
  stopFor(running, next) {
    this.next = next;
    this.live(`stop_${running}`, {});
    setTimeout(() => this.placeNext(), STOP_PATIENCE_MS);
  }

  placeNext() {
    const next = this.next;
    this.next = null;
    if (next) this.live(...next);
  }

  /** What Ada decided on this picture at this wish, if that is known and shown. */
  get decision() {
    const found = this.decisions.get(`${this.sceneKey()}|${this.state.saving}`);
    return found && this.state.ada && sameRun(found, {schedule: this.kinds, cutoff_block: this.cutoff, storage: this.state.storage}) ? found : null;
  }

  decideNow() {
    const known = this.decisions.get(`${this.sceneKey()}|${this.state.saving}`);
    if (!this.state.ada) return;
    if (known) this.showDecision(known);
    else if (this.state.request.prompt.trim()) this.order("decide", `${this.sceneKey()}|${this.state.saving}`, {saving: this.state.saving});
  }

  showDecision({schedule, cutoff_block, storage}) {
    const config = schedule.includes("r") ? {cutoff: cutoff_block} : {}; // of no use without reuse
    this.set({config, storage, edited: schedule, ada: true});
  }

  /** Of the prompt that is shown, or of the pair. */
  useDecisions(sceneKey, decided) {
    if (decided.length > 1) { this.pair = decided; return; }
    const [one] = decided;
    this.decisions.set(`${sceneKey}|${one.saving}`, one);
    if (this.decisions.size > MOST_DECISIONS) this.decisions.delete(this.decisions.keys().next().value);
    if (this.state.ada && sceneKey === this.sceneKey() && one.saving === this.state.saving) this.showDecision(one);
  }

  toggleStep(step) {
    const changed = toggled(this.kinds, step);
    if (changed) this.set({edited: changed});
    else this.notice(`Step ${step} cannot change alone: a reuse step needs a cache step before it.`);
  }

  play() {
    clearInterval(this.playing);
    const steps = this.state.request.steps;
    let step = 0;
    const stop = () => { clearInterval(this.playing); this.playing = null; this.render(); this.saveUrl(); };
    this.playing = setInterval(() => {
      if (step >= steps) { this.state.pinned = null; stop(); return; }
      this.state.pinned = step++;
      this.render();
    }, 80);
    this.stopPlaying = stop;
  }

  notice(text) {
    const note = h("div", {}, text, h("button", {ariaLabel: "Dismiss", onclick: () => note.remove()}, "×"));
    this.$(".bd-notices").append(note);
    setTimeout(() => note.remove(), 9000);
  }

  useModel({model, request, config, num_blocks, ...vocabulary}) {
    this.blocks = num_blocks;
    this.vocabularies[model] = vocabulary;
    this.set({model, request, config, edited: null, pinned: null});
  }

  do_more() { this.choose(MORE); }

  choose(model) { this.order("choose", "choose", {model, current: this.state.model}); }

  /** The address named a model, which is there now or cannot be: the rest of it is about that one. */
  readRest() {
    const given = this.addressed;
    this.addressed = null;
    this.readUrl(given, true);
    this.update();
  }

  /** Show a schedule that the planner found, and what it predicts. */
  usePlan({schedule, cutoff_block, storage, speedup_ideal, predicted, interval, distance}) {
    const text = `Planned: ${times(speedup_ideal)} ideal. Predicted ${distance}: ${tiny(predicted)}; ` +
      `for nine pictures in ten ${tiny(interval[0])} to ${tiny(interval[1])} (known of DDIM at guidance 4).`;
    this.plan = {schedule, cutoff_block, storage, text};
    this.set({config: {cutoff: cutoff_block}, storage, edited: schedule});
  }

  // ------------------------------------------------------------ wiring

  build() {
    const {settings} = this;
    this.parts = [...new Set(this.all("[data-part]").map((part) => part.dataset.part))];
    for (const element of this.all("[data-live]")) if (!this.live) element.remove();
    if (!this.live) this.$("#bd-prompt").parentElement.remove();
    this.$("form").onsubmit = (event) => { event.preventDefault(); this.draw(this.$("#bd-prompt").value); };
    for (const input of this.all(".bd-sliders input")) input.oninput = () => this.set({config: {[input.name]: Number(input.value)}});
    for (const name of ["seed", "steps", "guidance"]) {
      const input = this.$(`[name=${name}]`);
      if (input) input.onchange = () => this.setNumber(input);
    }
    const planner = this.$(".bd-planner");
    if (planner) planner.onsubmit = (event) => { event.preventDefault(); this.order("plan", "plan", {target_speedup: Number(this.$("#bd-target").value)}); };
    this.buildAda();
    const storage = this.$("[name=storage]");
    if (storage) storage.onchange = () => this.set({storage: storage.value});
    this.fill("sampler", settings.samplers || [], (sampler) => this.set({request: {sampler}}));
    this.fill("model", settings.models || [], (model) => this.choose(model));
    this.all("[data-do]").forEach((button) => { button.type = "button"; button.onclick = () => this[`do_${button.dataset.do}`](); });
    this.root.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.tourStep && !event.defaultPrevented) this.showTour(-1);
    });
    this.buildPictures();
    this.buildMap();
    this.buildStrip();
    this.choices(".bd-scales", SCALES, "scale");
    this.choices(".bd-modes", MODES, "mode");
    const table = this.$(".bd-table");
    table.ontoggle = () => this.renderTable();
    new IntersectionObserver((entries) => { if (entries.some((entry) => entry.isIntersecting)) this.wantPlots(); }, {rootMargin: "200px"})
      .observe(this.$(".bd-tradeoff"));
    new ResizeObserver(() => this.render()).observe(this.root);
  }

  /** The words, styles and examples of the model that is chosen. */
  renderWords() {
    const {model} = this.state, {known_words, styles = [], examples = []} = this.vocabularies[model] || {};
    if (!this.live || model === this.wordsOf) return;
    this.wordsOf = model;
    const words = this.$(".bd-words"), place = this.$(".bd-styles"), more = this.$(".bd-more");
    words.hidden = !known_words;
    words.lastChild.textContent = known_words?.join(", ") || "";
    place.hidden = !styles.length;
    place.replaceChildren(
      ...styles.map((style) => h("button", {type: "button", "data-choice": style, onclick: () => this.chooseStyle(style)}, style)),
      ...examples.map((prompt) => h("button", {type: "button", onclick: () => this.draw(prompt)}, prompt)));
    more.hidden = model === MORE || !this.settings.models?.includes(MORE);
  }

  get styles() { return this.vocabularies[this.state.model]?.styles || []; }

  /** The style that a prompt asks for by its word, if it asks for one. */
  styleOf(prompt) { return this.styles.find((style) => prompt.toLowerCase().split(/\s+/).includes(style)); }

  chooseStyle(style) {
    const {prompt} = this.state.request, without = prompt.split(/\s+/).filter((word) => !this.styles.includes(word.toLowerCase()));
    this.set({request: {prompt: [...(style === this.styleOf(prompt) ? [] : [style]), ...without].join(" ")}, pinned: null});
  }

  /** Draw what is typed, in the style of the last prompt unless it names one itself. */
  draw(typed) {
    const style = this.styleOf(this.state.request.prompt);
    this.set({request: {prompt: style && typed.trim() && !this.styleOf(typed) ? `${style} ${typed}` : typed}, pinned: null});
  }

  fill(name, values, chosen) {
    const select = this.$(`select[name=${name}]`);
    if (!select) return;
    select.append(...values.map((value) => h("option", {value}, value)));
    select.onchange = () => chosen(select.value);
  }

  setNumber(input) {
    const value = Number(input.value), low = Number(input.min), high = Number(input.max);
    const whole = input.name === "guidance" ? value : Math.round(value);
    const kept = clamp(Number.isFinite(whole) ? whole : low, low, high);
    if (kept !== value || input.value === "") {
      const kind = input.name === "guidance" ? "a number" : "an integer";
      this.notice(`${input.name} must be ${kind} in [${low}, ${high}], got ${input.value || "nothing"}; ${kept} is used.`);
    }
    this.set({request: {[input.name]: kept}});
  }

  choices(place, options, name) {
    this.$(place).append(...Object.entries(options).map(([value, label]) =>
      h("button", {type: "button", "data-choice": value, onclick: () => { this.state[name] = value; this.render(); this.saveUrl(); }}, label)));
  }

  buildAda() {
    const box = this.$("[name=ada]"), saving = this.$("[name=saving]"), pair = this.$(".bd-pair form");
    if (!box) return;
    box.onchange = () => this.set({ada: box.checked, edited: null});
    saving.oninput = () => this.set({saving: Number(saving.value), ada: true, edited: null});
    pair.simple.value = PAIR[0]; pair.complex.value = PAIR[1];
    pair.onsubmit = (event) => {
      event.preventDefault();
      const prompts = [pair.simple.value, pair.complex.value];
      if (prompts.every((prompt) => prompt.trim())) this.order("decide", ["pair", ...prompts].join("|"), {prompts, saving: this.state.saving});
      else this.notice("Type two prompts.");
    };
  }

  renderAda() {
    const place = this.$(".bd-ada"), {state, decision} = this;
    if (!place) return;
    const trained = state.model === "demo";
    place.hidden = this.$(".bd-pair").hidden = !trained;
    this.$("[name=ada]").checked = state.ada;
    this.$("[name=saving]").value = state.saving;
    this.$("[name=saving]").previousElementSibling.textContent = `${Math.round(100 * state.saving)} %`;
    const reused = decision ? [...decision.schedule].filter((kind) => kind === "r").length : 0, decided = decision?.probabilities.length;
    this.$(".bd-ada p").textContent = !state.ada ? "" : !decision ? "…" : !decided ? "Too few steps to decide on." :
      `Decided at step ${decision.first}: ${reused} of ${decided} steps reuse (${Math.round(100 * reused / decided)} %). The wish is met in the mean over pictures, not by each.`;
    if (this.pair && this.pair !== this.pairShown) this.renderPair();
  }

  renderPair() {
    this.pairShown = this.pair;
    this.$(".bd-pair .bd-row").replaceChildren(...this.pair.map((one) => {
      const picture = h("canvas", {}), band = h("canvas", {className: "bd-band"}), [width, height] = this.scene?.size || [64, 64];
      this.drawTile(picture, {size: [width, height]}, one.picture);
      const reused = [...one.schedule].filter((kind) => kind === "r").length;
      band.width = 600; band.height = 90;
      this.drawBand(band.getContext("2d"), one, band.width, band.height);
      const told = ` ${reused} of ${one.probabilities.length} decided steps reuse, ${times(one.speedup_ideal)} ideal, LPIPS ${small(one.lpips)}`;
      return h("figure", {}, picture, band, h("figcaption", {}, h("b", {}, one.prompt), told));
    }));
  }

  /** A schedule as a row of colours, and over it the probability of a cache step. */
  drawBand(c, {schedule, first, probabilities}, width, height) {
    const kinds = [...schedule.replace(/\d+/g, "")], cell = width / kinds.length; // reuse steps may name their blocks
    kinds.forEach((kind, step) => { c.fillStyle = KIND_COLOURS[kind]; c.fillRect(step * cell + 1, 0, cell - 2, height); });
    this.drawProbabilities(c, first, probabilities, 0, cell, 6, height - 12);
  }

  drawProbabilities(c, first, probabilities, left, cell, top, height) {
    const at = (k) => [left + (first + k + 0.5) * cell, top + (1 - probabilities[k]) * height];
    for (const [colour, lineWidth] of [["rgba(255, 255, 255, 0.9)", 4], ["#111111", 1.5]]) {
      c.strokeStyle = c.fillStyle = colour; c.lineWidth = lineWidth;
      c.beginPath();
      probabilities.forEach((_, k) => k ? c.lineTo(...at(k)) : c.moveTo(...at(k)));
      c.stroke();
      probabilities.forEach((_, k) => { c.beginPath(); c.arc(...at(k), 1 + lineWidth / 2, 0, 7); c.fill(); });
    }
  }

  buildPictures() {
    const scrubber = this.$("[name=step]");
    scrubber.oninput = () => {
      if (this.playing) this.stopPlaying();
      const step = Number(scrubber.value);
      this.set({pinned: step >= this.state.request.steps ? null : step});
    };
    const both = this.$("[data-picture=both]");
    const move = (event) => {
      const box = both.getBoundingClientRect();
      this.state.wipe = clamp((event.clientX - box.left) / box.width, 0, 1);
      this.renderPictures();
    };
    both.onpointerdown = (event) => {
      if (this.state.mode === "flip") { this.state.flipped = !this.state.flipped; this.renderPictures(); return; }
      both.setPointerCapture(event.pointerId);
      move(event);
    };
    both.onpointermove = (event) => { if (event.buttons && this.state.mode === "wipe") move(event); };
    both.onkeydown = (event) => {
      const by = {ArrowLeft: -0.05, ArrowRight: 0.05}[event.key];
      if (by) this.state.wipe = clamp(this.state.wipe + by, 0, 1);
      else if (event.key === " " || event.key === "Enter") this.state.flipped = !this.state.flipped;
      else return;
      event.preventDefault();
      this.renderPictures();
    };
  }

  // ------------------------------------------------------------ rendering

  render() {
    const {state} = this, {request, config} = state, scene = this.scene;
    for (const input of this.all(".bd-sliders input")) {
      if (input.name === "cutoff") input.max = this.blocks - 2;
      input.value = config[input.name];
      input.previousElementSibling.textContent = input.name === "start" || input.name === "end" ? config[input.name].toFixed(2) : config[input.name];
    }
    for (const [name, value] of Object.entries({...request, model: state.model})) {
      const control = name === "prompt" ? this.$("#bd-prompt") : this.$(`.bd-sampling [name=${name}]`);
      if (control && document.activeElement !== control) control.value = value;
    }
    if (this.live) this.$("[name=storage]").value = state.storage;
    this.renderWords();
    for (const button of this.all(".bd-styles [data-choice]")) button.setAttribute("aria-pressed", button.dataset.choice === this.styleOf(request.prompt));
    for (const button of this.all(".bd-chips button")) button.setAttribute("aria-pressed", button.dataset.key === this.sceneKey());
    const planned = this.plan && sameRun(this.plan, {schedule: this.kinds, cutoff_block: this.cutoff, storage: state.storage});
    this.$(".bd-edited").hidden = !state.edited;
    this.$(".bd-edited span").textContent = this.decision ? "Ada decided the schedule."
      : planned ? "The planner chose the schedule." : "The schedule was edited by hand.";
    if (this.live) this.$(".bd-planner p").textContent = planned ? this.plan.text : "";
    for (const [place, name] of [[".bd-scales", "scale"], [".bd-modes", "mode"]])
      for (const button of this.all(`${place} button`)) button.setAttribute("aria-pressed", button.dataset.choice === state[name]);
    this.renderAda();
    this.renderStatus(scene);
    this.renderPictures();
    this.renderNumbers(scene);
    this.renderMap(scene);
    this.renderFeatures(scene);
    this.renderStrip(scene);
    this.renderTable();
    this.drawPlots();
    this.tourStep?.check?.call(this);
  }

  status(text, progress = null) {
    this.$(".bd-status p").textContent = text;
    const bar = this.$(".bd-status progress"), stop = this.$("[data-do=stop]");
    bar.hidden = progress === null;
    bar.value = progress ?? 0;
    if (stop) stop.hidden = progress === null;
  }

  renderStatus(scene) {
    if (this.waiting) { this.status(`${this.waiting.phase} …`, this.waiting.progress); return; }
    if (this.stopped) { this.status("Stopped."); return; }
    const run = this.runOf(scene), {request} = this.state;
    if (!run) { this.status(this.live ? "" : this.manifest ? NOT_SHIPPED : "Loading …"); return; }
    const how = scene.shipped && !run.live ? "computed ahead, shipped with the page" : "computed live";
    this.status(`“${request.prompt}”, seed ${request.seed}, ${request.steps} steps, guidance ${request.guidance}, ${request.sampler}: ${how}.`);
  }

  renderPictures() {
    const {scene, state, step} = this, steps = state.request.steps;
    const run = this.runOf(scene), control = this.controlOf(scene);
    const seen = step !== null && scene?.baseline?.previews && run?.previews ? step : null;
    const at = (drawn, isControl) => !drawn ? null : seen === null || isControl ? drawn.picture : {...drawn.previews, column: seen};
    const baseline = at(scene?.baseline), variant = at(run);
    for (const [name, ref] of Object.entries({baseline, variant, control: at(control, true)})) this.drawTile(this.$(`[data-picture=${name}]`), scene, ref);
    this.drawBoth(scene, baseline, variant);
    const name = (picture, text) => { this.$(`[data-picture=${picture}]`).nextElementSibling.textContent = text; };
    name("control", `Fewer steps${control ? `: ${control.steps}` : ""}${seen === null ? "" : " (final)"}`);
    name("variant", run || !scene ? "BlockDance" : "BlockDance …");
    const scrubber = this.$("[name=step]");
    scrubber.max = steps;
    scrubber.value = state.pinned ?? steps;
    const kind = step === null ? "" : `, ${KIND_NAMES[this.kinds[step]]}`;
    this.$(".bd-scrubber output").textContent = step === null ? "final picture" : `expected at step ${step} of ${steps}${kind}`;
    this.$("[data-do=play]").classList.toggle("playing", Boolean(this.playing));
  }

  /** Draw a tile into a canvas; one that is not there leaves the old one, dimmed. */
  async drawTile(canvas, scene, ref) {
    canvas.classList.toggle("stale", !ref);
    if (!ref) return;
    const [width, height] = scene.size, wanted = canvas.wanted = `${ref.src}|${ref.column}|${ref.row}`;
    const source = await image(ref.src);
    if (canvas.wanted !== wanted) return;
    canvas.dataset.tile = `${ref.column},${ref.row}`;
    canvas.width = width; canvas.height = height;
    canvas.getContext("2d").drawImage(source, ref.column * width, ref.row * height, width, height, 0, 0, width, height);
  }

  async drawBoth(scene, baseline, variant) {
    const canvas = this.$("[data-picture=both]");
    canvas.classList.toggle("stale", !(baseline && variant));
    canvas.setAttribute("aria-valuenow", Math.round(100 * this.state.wipe));
    if (!baseline || !variant) return;
    const {mode, wipe, flipped} = this.state, [width, height] = scene.size;
    const wanted = canvas.wanted = [baseline, variant].map((ref) => `${ref.src}|${ref.column}|${ref.row}`).join() + mode + wipe + flipped;
    const [left, right] = await Promise.all([image(baseline.src), image(variant.src)]);
    if (canvas.wanted !== wanted) return;
    canvas.width = width; canvas.height = height;
    const context = canvas.getContext("2d", {willReadFrequently: true});
    const paint = (source, ref) => context.drawImage(source, ref.column * width, ref.row * height, width, height, 0, 0, width, height);
    if (mode === "flip") { paint(...(flipped ? [right, variant] : [left, baseline])); return; }
    paint(right, variant);
    if (mode === "difference") {
      const theirs = context.getImageData(0, 0, width, height);
      paint(left, baseline);
      const ours = context.getImageData(0, 0, width, height);
      for (let i = 0; i < ours.data.length; i++) if (i % 4 < 3) ours.data[i] = Math.min(255, 8 * Math.abs(ours.data[i] - theirs.data[i]));
      context.putImageData(ours, 0, 0);
      return;
    }
    const edge = Math.round(wipe * width);
    context.save();
    context.beginPath(); context.rect(0, 0, edge, height); context.clip();
    paint(left, baseline);
    context.restore();
    context.fillStyle = KIND_COLOURS.r;
    context.fillRect(clamp(edge, 0, width - 1), 0, 1, height);
  }

  coverage() {
    const reused = [...this.kinds].filter((kind) => kind === "r").length, steps = this.kinds.length;
    return reused ? `${this.cutoff + 1} of ${this.blocks} blocks reused on ${reused} of ${steps} steps.`
      : `Nothing is reused: all ${this.blocks} blocks run on all ${steps} steps.`;
  }

  renderNumbers(scene) {
    const run = this.runOf(scene), control = this.controlOf(scene), {kinds, cutoff, blocks} = this;
    const measured = run?.speedup_measured ? times(run.speedup_measured) : run ? "–" : "…";
    const figure = (value, label, title = "") => h("div", {title}, h("b", {}, value), h("span", {}, label));
    const yardstick = (key) => scene?.yardsticks?.[key] && {...scene.yardsticks[key], yardstick: true};
    const rows = [
      [this.state.storage === "latest" ? "BlockDance" : "BlockDance, extrapolated", run],
      [control ? `plain sampler, ${control.steps} steps` : "fewer steps", control],
      ["JPEG, quality 90", yardstick("jpeg")], ["another seed", yardstick("seed")],
    ];
    const part = (value) => value > 0 ? clamp((Math.log10(value) + 5) / 5, 0.02, 1) : 0; // 0.00001 to 1
    const bar = (value) => h("i", {className: "bd-bar", style: `width:${BAR_PX * part(value)}px; margin-right:${BAR_PX * (1 - part(value))}px`});
    const cells = (row) => !row ? ["…", "…", "…", "…", "…"] : [
      row.yardstick ? "" : row.speedup_measured ? times(row.speedup_measured) : "–", row.yardstick ? "" : times(row.speedup_ideal),
      h("span", {}, small(row.lpips), bar(row.lpips)), row.ssim.toFixed(4), row.psnr === null ? "∞" : `${row.psnr.toFixed(1)} dB`];
    const columns = ["measured", "ideal", "LPIPS", "SSIM", "PSNR"].map((name) => h("th", {scope: "col"}, name));
    const table = h("table", {}, h("thead", {}, h("tr", {}, h("th", {}, "difference from the baseline"), ...columns)),
      h("tbody", {}, ...rows.map(([name, row]) => h("tr", {}, h("th", {scope: "row"}, name), ...cells(row).map((cell) => h("td", {}, cell))))));
    const spread = run?.speedup_measured_quartiles ? `, quartiles ${run.speedup_measured_quartiles.map(times).join(" to ")}` : "";
    const often = run && !run.speedup_measured ? "nothing is reused, so nothing was timed"
      : run?.rounds > 1 ? `medians of ${run.rounds} interleaved rounds${spread}` : "timed once";
    const note = h("p", {className: "bd-note"}, `${run ? `${often}; ${run.machine || scene.machine}. ` : ""}` +
      `${(run?.lpips_name || control?.lpips_name) ?? "LPIPS"}, SSIM and PSNR are a difference from the baseline, not a quality; ` +
      `the bars are logarithmic.${this.state.model === "demo" ? WEAK_YARDSTICK : ""}`);
    const measure = this.$("[data-do=measure]");
    if (measure) measure.disabled = !run || !kinds.includes("r") || Boolean(this.waiting);
    this.$(".bd-numbers div").replaceChildren(
      h("div", {className: "bd-figures"}, figure(times(this.ideal), "ideal speedup", "from block counts"),
        figure(measured, "measured", "baseline seconds over ours"), figure(run ? small(run.lpips) : "…", "LPIPS"), figure(run ? run.ssim.toFixed(4) : "…", "SSIM")),
      h("p", {}, `${this.coverage()} ${blocksRun(kinds, cutoff, blocks)} of ${blocks * kinds.length} block evaluations` +
        `${run?.cache_bytes ? `; cache ${Math.round(run.cache_bytes / 1024)} KiB` : ""}.`), table, note);
  }

  renderFeatures(scene) {
    const section = this.$(".bd-features"), features = scene?.features;
    section.classList.toggle("empty", !features);
    const step = this.step ?? this.state.request.steps - 1;
    this.$(".bd-features [data-step]").textContent = `step ${step}`;
    const row = this.$(".bd-features .bd-row");
    if (!features) {
      row.replaceChildren(h("p", {className: "bd-note"}, scene?.map && !this.waiting ? "Not available for this model." : "…"));
      return;
    }
    const blocks = Object.entries(features.blocks);
    if (row.children.length !== blocks.length || row.dataset.blocks !== blocks.map(([block]) => block).join()) {
      row.dataset.blocks = blocks.map(([block]) => block).join();
      row.replaceChildren(...blocks.map(([block]) => h("figure", {}, h("canvas", {width: features.side, height: features.side}),
        h("figcaption", {}, `${features.names[block]}: block ${block}`))));
    }
    blocks.forEach(async ([, ref], index) => {
      const canvas = row.children[index].firstChild, side = features.side, source = await image(ref.src);
      canvas.getContext("2d").drawImage(source, step * side, ref.row * side, side, side, 0, 0, side, side);
    });
  }

  buildStrip() {
    this.strip = [1, 2, 3, 4].map((interval) => ({interval, canvas: h("canvas", {}), told: h("span", {})}));
    this.$(".bd-strip .bd-row").append(...this.strip.map(({interval, canvas, told}) =>
      h("button", {type: "button", onclick: () => this.set({config: {interval}, edited: null})}, canvas, h("b", {}, `N = ${interval}`), told)));
  }

  renderStrip(scene) {
    const {config, request, edited} = this.state;
    for (const {interval, canvas, told} of this.strip) {
      const kinds = fixedSchedule({...config, interval}, request.steps), run = this.runOf(scene, kinds, this.cutoff);
      this.drawTile(canvas, scene, run?.picture);
      told.textContent = run ? `${times(run.speedup_ideal)} ideal, LPIPS ${small(run.lpips)}`
        : `${times(idealSpeedup(kinds, this.cutoff, this.blocks))} ideal, not drawn yet`;
      canvas.parentElement.setAttribute("aria-pressed", interval === config.interval && !edited);
    }
  }

  // ------------------------------------------------------------ the map: a canvas that is the control

  buildMap() {
    const canvas = this.$("[data-map]");
    const place = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    let dragging = null;
    canvas.onpointerdown = (event) => {
      const [x, y] = place(event), {kind, step} = this.hit(x, y);
      if (kind === "cutoff" || kind === "start" || kind === "end") { dragging = kind; canvas.setPointerCapture(event.pointerId); }
      else if (kind === "band") this.toggleStep(step);
      else if (kind === "cell") this.set({pinned: this.state.pinned === step ? null : step});
    };
    canvas.onpointermove = (event) => {
      const [x, y] = place(event), target = this.hit(x, y);
      if (dragging) { this.drag(dragging, x, y); return; }
      canvas.style.cursor = {cutoff: "ns-resize", start: "ew-resize", end: "ew-resize", band: "pointer", cell: "crosshair"}[target.kind] || "default";
      const hover = target.kind === "cell" || target.kind === "band" ? target.step : null;
      this.tip(target, x, y);
      if (hover === this.state.hover) return;
      this.state.hover = hover;
      this.renderPictures();
      this.renderMap(this.scene);
      this.renderFeatures(this.scene);
    };
    canvas.onpointerup = () => { dragging = null; };
    canvas.onpointerleave = () => { this.state.hover = null; this.$(".bd-tip").hidden = true; this.render(); };
    canvas.onkeydown = (event) => this.mapKey(event);
  }

  /** What lies under a point of the map. */
  hit(x, y) {
    const {left, top, cell, row, band, bottom} = this.shape, steps = this.kinds.length;
    const step = Math.floor((x - left) / cell), block = this.blocks - 1 - Math.floor((y - top) / row);
    if (step < 0 || step >= steps) return {};
    if (y >= bottom && y < bottom + band) return {kind: "band", step};
    if (y < top || y >= bottom) return {};
    const near = (a, b) => Math.abs(a - b) < 6;
    if (near(y, this.lineY())) return {kind: "cutoff", step, block};
    if (!this.state.edited) for (const edge of ["start", "end"]) if (near(x, this.edgeX(edge))) return {kind: edge, step, block};
    return {kind: "cell", step, block};
  }

  lineY({bottom, row} = this.shape) { return bottom - (this.cutoff + 1) * row; }
  edgeX(edge, {left, cell} = this.shape) { return left + roundHalfEven(this.state.config[edge] * this.kinds.length) * cell; }

  drag(what, x, y) {
    const {left, cell, row, bottom} = this.shape, steps = this.kinds.length;
    if (what === "cutoff") this.set({config: {cutoff: clamp(Math.round((bottom - y) / row) - 1, 0, this.blocks - 2)}});
    else this.set({config: {[what]: Math.round(100 * clamp(Math.round((x - left) / cell), 0, steps) / steps) / 100}});
  }

  mapKey(event) {
    const {pinned, config, request} = this.state, step = pinned ?? 0, last = request.steps - 1;
    const act = {
      ArrowUp: () => this.set({config: {cutoff: config.cutoff + 1}}), ArrowDown: () => this.set({config: {cutoff: config.cutoff - 1}}),
      ArrowLeft: () => this.set({pinned: clamp(step - 1, 0, last)}), ArrowRight: () => this.set({pinned: pinned === null ? 0 : clamp(step + 1, 0, last)}),
      Home: () => this.set({pinned: 0}), End: () => this.set({pinned: last}), Escape: () => this.set({pinned: null}),
      Enter: () => this.toggleStep(step), " ": () => this.toggleStep(step),
      "[": () => this.set({config: {start: clamp(config.start - 0.05, 0, 1)}}), "]": () => this.set({config: {start: clamp(config.start + 0.05, 0, 1)}}),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  }

  tip({kind, step, block}, x, y) {
    const tip = this.$(".bd-tip"), source = step === undefined ? null : reusedFrom(this.kinds)[step];
    tip.hidden = kind !== "cell" && kind !== "band";
    if (tip.hidden) return;
    const value = this.scene?.map?.[block]?.[step], fate = source !== null && block <= this.cutoff ? `reused from step ${source}` : "computed";
    const chance = this.decision?.probabilities[step - this.decision.first];
    const ada = chance === undefined ? "" : `Ada: cache with probability ${chance.toFixed(2)}; `;
    const ran = `${blocksRun(this.kinds[step], this.cutoff, this.blocks)} of ${this.blocks} blocks run`;
    tip.textContent = kind === "band" ? `step ${step}: ${KIND_NAMES[this.kinds[step]]}, ${ran}; ${ada}click to change`
      : `block ${block}, step ${step}: ${value == null ? "nothing to compare" : `cosine ${value.toFixed(5)}`}; ${fate}`;
    tip.style.transform = `translate(${clamp(this.shape.width - tip.offsetWidth, 0, x + 12)}px, ${y + 14}px)`;
  }

  /** Every value of the map as a fraction of the colours, 1 for most alike, and what the ends of the colours mean. */
  shades(map) {
    const {scale} = this.state, log = (value) => -Math.log10(Math.max(1 - value, 1e-6));
    const shown = map.map((row) => row.map((value) => value === null ? null : scale === "cosine" ? value : log(value)));
    const ends = (values) => values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const all = ends(shown.flat().filter((value) => value !== null));
    const fractions = shown.map((row) => {
      const [low, high] = scale === "block" ? ends(row.filter((value) => value !== null)) : all;
      return row.map((value) => value === null ? null : high > low ? (value - low) / (high - low) : 1);
    });
    const told = {cosine: (value) => value.toFixed(4), log: (value) => `1 − ${(10 ** -value).toExponential(0)}`, block: () => ""}[scale];
    return {fractions, ends: scale === "block" ? ["its least alike", "its most alike"] : all.map(told)};
  }

  renderMap(scene) {
    const canvas = this.$("[data-map]"), width = canvas.parentElement.clientWidth, {kinds} = this;
    if (!width) return;
    this.shape = this.mapShape(width, clamp(Math.round(300 / this.blocks), 8, 22));
    canvas.style.height = `${this.shape.height}px`;
    this.paintMap(canvas, scene, this.shape, devicePixelRatio || 1, getComputedStyle(canvas).color);
    const reused = [...kinds].filter((kind) => kind === "r").length;
    this.$(".bd-plan").textContent = `${this.coverage()} Ideal speedup ${times(this.ideal)}. Schedule ${kinds}.`;
    canvas.setAttribute("aria-label", `Similarity map. Cutoff block ${this.cutoff}, ${reused} reuse steps. Arrow up and down move the cutoff, ` +
      "left and right the step, Enter toggles the step, brackets move the window's start.");
  }

  /** Where the parts of a map lie that is `width` wide, with blocks of `row` pixels. */
  mapShape(width, row) {
    const left = 44, top = 8, band = this.decision ? 44 : 24, bottom = top + row * this.blocks;
    return {left, top, cell: (width - left - 12) / this.kinds.length, row, band, bottom, width, height: bottom + band + 34};
  }

  paintMap(canvas, scene, shape, ratio, ink) {
    const {left, cell, row, band, bottom, width, height} = shape, {kinds} = this, steps = kinds.length;
    canvas.width = width * ratio; canvas.height = height * ratio;
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio);
    c.font = "12px system-ui, sans-serif";
    const colours = scene?.map ? this.shades(scene.map) : null, sources = reusedFrom(kinds), line = this.lineY(shape);
    for (let block = 0; block < this.blocks; block++) for (let step = 0; step < steps; step++) {
      const shade = colours?.fractions[block]?.[step];
      c.fillStyle = shade == null ? "rgba(128, 128, 128, 0.18)" : viridis(shade);
      c.fillRect(left + step * cell, bottom - (block + 1) * row, cell - 0.5, row - 0.5);
    }
    c.strokeStyle = "rgba(10, 10, 10, 0.7)"; c.lineWidth = 1.2;
    for (let step = 0; step < steps; step++) if (sources[step] !== null) this.hatch(c, left + step * cell, line, cell, bottom - line);
    this.drawSteps(c, shape);
    if (this.decision) this.drawProbabilities(c, this.decision.first, this.decision.probabilities, left, cell, bottom + 6, band - 8);
    this.drawHandles(c, ink, shape);
    this.drawAxes(c, ink, shape);
    if (colours && width > 700) this.drawLegend(c, ink, shape, colours.ends);
  }

  /** The band below the map: a bar a step, as high as the share of the blocks that run. */
  drawSteps(c, {left, cell, band, bottom}) {
    const full = band - 6;
    [...this.kinds].forEach((kind, step) => {
      const high = full * blocksRun(kind, this.cutoff, this.blocks) / this.blocks, x = left + step * cell + 0.5;
      c.fillStyle = KIND_COLOURS[kind];
      c.globalAlpha = 0.3; c.fillRect(x, bottom + 5, cell - 1, full);
      c.globalAlpha = 1; c.fillRect(x, bottom + 5 + full - high, cell - 1, high);
    });
  }

  hatch(c, x, y, width, height) {
    c.save();
    c.beginPath(); c.rect(x, y, width, height); c.clip();
    c.beginPath();
    for (let at = -height; at < width; at += 7) { c.moveTo(x + at, y + height); c.lineTo(x + at + height, y); }
    c.stroke();
    c.restore();
  }

  /** Where the cutoff's handle leaves the window's edges free. */
  handleX(shape) {
    const {left, width} = shape, [start, end] = ["start", "end"].map((edge) => this.edgeX(edge, shape));
    if (start - left > HANDLE_PX + 8) return left + 4;
    return width - 12 - end > HANDLE_PX + 8 ? width - 16 - HANDLE_PX : (start + end - HANDLE_PX) / 2;
  }

  drawHandles(c, ink, shape) {
    const {left, top, cell, bottom, width} = shape, y = this.lineY(shape), step = this.step, handle = this.handleX(shape);
    c.strokeStyle = KIND_COLOURS.r; c.lineWidth = 3;
    c.beginPath(); c.moveTo(left, y); c.lineTo(width - 12, y); c.stroke();
    c.fillStyle = KIND_COLOURS.r;
    c.beginPath(); c.roundRect(handle, y - 10, HANDLE_PX, 20, 6); c.fill();
    c.fillStyle = "#1b1b1b"; c.textAlign = "center"; c.textBaseline = "middle";
    c.fillText(`↕ cutoff ${this.cutoff}`, handle + HANDLE_PX / 2, y + 1);
    if (!this.state.edited) for (const edge of ["start", "end"]) {
      const x = this.edgeX(edge, shape);
      c.setLineDash([5, 4]); c.lineWidth = 2;
      c.beginPath(); c.moveTo(x, top); c.lineTo(x, bottom); c.stroke();
      c.setLineDash([]);
      c.fillStyle = KIND_COLOURS.r;
      c.beginPath(); c.roundRect(x - 5, top, 10, 18, 4); c.fill();
    }
    if (step !== null) {
      c.strokeStyle = ink; c.lineWidth = 2;
      c.strokeRect(left + step * cell, top, cell, bottom - top);
    }
  }

  drawAxes(c, ink, {left, cell, row, bottom, band, width, height}) {
    const steps = this.kinds.length;
    c.fillStyle = ink; c.textBaseline = "middle"; c.textAlign = "right";
    for (let block = 0; block < this.blocks; block += 4) c.fillText(block, left - 6, bottom - (block + 0.5) * row);
    c.textAlign = "center";
    for (let step = 0; step < steps; step += steps > 50 ? 10 : 5) c.fillText(step, left + (step + 0.5) * cell, bottom + band + 8);
    if (width > 520) c.fillText("step (0 is the noisiest)", (left + width) / 2, height - 8);
    c.save(); c.translate(10, bottom / 2); c.rotate(-Math.PI / 2); c.fillText("block", 0, 0); c.restore();
    let x = left;
    c.textAlign = "left";
    for (const [kind, name] of Object.entries(KIND_NAMES)) {
      c.fillStyle = KIND_COLOURS[kind]; c.fillRect(x, height - 13, 10, 10);
      c.fillStyle = ink; c.fillText(name, x + 14, height - 7);
      x += 62;
    }
  }

  drawLegend(c, ink, {width, height}, [low, high]) {
    const right = width - 12, bar = 90;
    c.textAlign = "right"; c.fillStyle = ink;
    c.fillText(high, right, height - 7);
    const end = right - c.measureText(high).width - 6;
    for (let x = 0; x < bar; x++) { c.fillStyle = viridis(x / bar); c.fillRect(end - bar + x, height - 13, 1.5, 10); }
    c.fillStyle = ink;
    c.fillText(low, end - bar - 6, height - 7);
  }

  renderTable() {
    const details = this.$(".bd-table"), map = this.scene?.map;
    if (!details.open) return;
    if (!map) { details.lastElementChild.replaceChildren("Nothing was measured yet."); return; }
    const sources = reusedFrom(this.kinds);
    const head = h("tr", {}, h("th", {}, "block"), ...map[0].map((_, step) => h("th", {scope: "col"}, `${step} ${KIND_NAMES[this.kinds[step]]}`)));
    const rows = map.map((values, block) => h("tr", {}, h("th", {scope: "row"}, String(block)), ...values.map((value, step) =>
      h("td", {className: sources[step] !== null && block <= this.cutoff ? "reused" : ""}, value === null ? "" : value.toFixed(4)))));
    details.lastElementChild.replaceChildren(h("table", {}, h("thead", {}, head), h("tbody", {}, ...rows.reverse())));
  }

  // ------------------------------------------------------------ plots

  wantPlots() {
    if (this.plotting) return;
    this.plotting = window.Plotly ? Promise.resolve() : new Promise((resolve, reject) => {
      document.head.append(h("script", {src: this.plotly, onload: resolve, onerror: () => reject(new Error("plotly could not be loaded"))}));
    });
    this.plotting.then(() => this.drawPlotsNow(), (error) => this.notice(error.message));
    this.openComparison();
  }

  drawPlotsNow() {
    const scene = this.scene, run = this.runOf(scene);
    if (!window.Plotly || !this.plotting || !scene?.baseline) return;
    const ink = getComputedStyle(this.root).color, axis = (title) => ({title: {text: title}, gridcolor: GRID, zeroline: false});
    const layout = (x, y, more = {}) => ({
      xaxis: axis(x), yaxis: axis(y), height: 300, margin: {l: 60, r: 10, t: 10, b: 45},
      font: {color: ink, family: "system-ui, sans-serif"}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      legend: {orientation: "h", y: 1.12}, ...more});
    const options = {displaylogo: false, responsive: true, toImageButtonOptions: {format: "svg", filename: "blockdance"},
                     modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
    const react = (name, data, shape) => Plotly.react(this.$(`[data-plot=${name}]`), data, shape, options);
    this.drawTradeoff(scene, run, layout, react);
    if (this.comparison) this.drawComparison(layout, react);
    const difference = run?.step_difference || [];
    react("steps", [{x: difference.map((_, step) => step), y: difference, type: "bar",
                     marker: {color: difference.map((_, step) => KIND_COLOURS[this.kinds[step]])},
                     hovertemplate: "step %{x}: %{y:.4f}<extra></extra>"}], layout("step", "difference, relative"));
    if (scene.map) {
      const first = roundHalfEven(0.5 * scene.map[0].length);
      const change = scene.map.map((values) => {
        const late = values.slice(first).filter((value) => value !== null);
        return late.reduce((sum, value) => sum + 1 - value, 0) / late.length;
      });
      react("blocks", [{x: change, y: change.map((_, block) => block), type: "bar", orientation: "h",
                        marker: {color: change.map((_, block) => block <= this.cutoff ? KIND_COLOURS.r : KIND_COLOURS.f)},
                        hovertemplate: "block %{y}: %{x:.5f}<extra></extra>"}], layout("mean of 1 − cosine, second half of the run", "block"));
    }
  }

  /** The comparison of methods over many prompts, which ships with the page. */
  async openComparison() {
    const answer = await fetch(`${this.atlas}comparison.json`).catch(() => null);
    if (!answer?.ok) return;
    this.comparison = await answer.json();
    const counts = Object.keys(this.comparison.steps);
    this.comparedAt = counts[0];
    this.$(".bd-counts").append(...counts.map((steps) => h("button", {type: "button", "data-steps": steps, onclick: () => {
      this.comparedAt = steps;
      this.drawPlotsNow();
    }}, `${steps} steps`)));
    this.$(".bd-compared").hidden = false;
    this.drawPlotsNow();
  }

  drawComparison(layout, react) {
    const {lpips_name, prompts, steps, colours} = this.comparison, {curves, verdicts} = steps[this.comparedAt];
    for (const button of this.all(".bd-counts button")) button.setAttribute("aria-pressed", button.dataset.steps === this.comparedAt);
    this.$(".bd-compared p").textContent = `${prompts} prompts, each method at several settings, timed side by side when the page was made: ` +
      "the mean over prompts. A line joins a method's best settings; ablations are in the legend, a click shows them. " +
      "Below it, for every speed, who changes the picture least.";
    this.$(".bd-compared ul").replaceChildren(...verdicts.map((text) => h("li", {}, text)));
    const best = (one, all) => !all.some((other) => other.speedup > one.speedup && other.lpips <= one.lpips);
    const data = Object.entries(curves).filter(([, all]) => all.length).map(([name, all]) => {
      // What skips nothing changes nothing, and has no place on a logarithmic axis.
      const points = all.filter((one) => one.lpips > 0 && best(one, all)), ours = name.startsWith("blockdance");
      return {
        name, x: points.map((one) => one.speedup), y: points.map((one) => one.lpips), mode: "lines+markers",
        visible: ABLATION.test(name) ? "legendonly" : true,
        line: {color: colours[name], width: ours ? 3 : 1.5, dash: ours ? "solid" : "dot"},
        error_y: {array: points.map((one) => one.interval[1] - one.lpips), arrayminus: points.map((one) => one.lpips - one.interval[0]),
                  thickness: 1, width: 2},
        text: points.map((one) =>
          `${name} ${one.knob}: worst ${small(one.worst)}, SSIM ${one.ssim.toFixed(4)}, ${(one.peak_bytes / 2 ** 20).toFixed(1)} MiB`),
        hovertemplate: "%{text}<br>%{x:.2f}×, LPIPS %{y:.6f}<extra></extra>",
      };
    });
    const narrow = this.$("[data-plot=compared]").clientWidth < 600;  // a legend of one column
    const axis = {title: {text: `${lpips_name}, mean`}, type: "log", dtick: 1, gridcolor: GRID, exponentformat: "power"};
    react("compared", data, layout("speedup, measured", "", {height: narrow ? 680 : 460, yaxis: axis, legend: {orientation: "h", y: -0.25}}));
  }

  drawTradeoff(scene, run, layout, react) {
    const key = this.sceneKey(), isTried = (dot) => this.tried.some((old) => old.key === key && sameRun(old, dot));
    const dots = scene.runs.filter((dot) => dot.speedup_measured).sort((a, b) => a.speedup_measured - b.speedup_measured);
    const beats = (other, dot) => other !== dot && other.speedup_measured >= dot.speedup_measured && other.lpips < dot.lpips;
    const frontier = dots.filter((dot) => !dots.some((other) => beats(other, dot)));
    const controls = [...scene.controls].sort((a, b) => a.speedup_measured - b.speedup_measured);
    const told = (dot) => `${dot.schedule}, cutoff ${dot.cutoff_block}${storageOf(dot) === "latest" ? "" : ", extrapolated"}`;
    const series = (name, of, more) => ({
      name, x: of.map((dot) => dot.speedup_measured), y: of.map((dot) => dot.lpips),
      customdata: of.map((dot) => [dot.schedule, dot.cutoff_block, storageOf(dot)]),
      text: of.map((dot) => dot.schedule.includes("r") ? told(dot) : `${dot.steps} steps`),
      hovertemplate: "%{text}<br>%{x:.2f}×, LPIPS %{y:.5f}<extra></extra>", ...more});
    const points = (name, of, marker) => series(name, of, {mode: "markers", marker});
    const data = [
      points("BlockDance, computed ahead", dots.filter((dot) => !isTried(dot)), {color: KIND_COLOURS.c, size: 7, opacity: 0.85}),
      points("BlockDance, tried", dots.filter((dot) => isTried(dot) && storageOf(dot) === "latest"), {color: KIND_COLOURS.c, size: 10}),
      points("BlockDance extrapolated, tried", dots.filter((dot) => storageOf(dot) !== "latest"), {color: KIND_COLOURS.r, size: 10, symbol: "diamond"}),
      series("best of BlockDance", frontier, {mode: "lines", line: {color: KIND_COLOURS.c, width: 1}, hoverinfo: "skip", hovertemplate: null}),
      series("fewer steps, no cache", controls, {mode: "lines+markers", marker: {color: KIND_COLOURS.f, size: 8, symbol: "square"},
                                                 line: {color: KIND_COLOURS.f, dash: "dot"}}),
    ];
    if (run?.speedup_measured) data.push(points("shown", [run], {color: "rgba(0,0,0,0)", size: 16, line: {color: KIND_COLOURS.r, width: 3}}));
    this.listDots(dots, controls, told);
    const plot = this.$("[data-plot=tradeoff]"), narrow = plot.clientWidth < 600;  // a legend of one column
    const axis = {title: {text: "LPIPS (difference)"}, rangemode: "tozero", gridcolor: GRID};
    react("tradeoff", data, layout("speedup, measured", "", {height: narrow ? 480 : 400, yaxis: axis, legend: {orientation: "h", y: narrow ? -0.2 : -0.22}}))
      .then(() => { plot.removeAllListeners?.("plotly_click"); plot.on("plotly_click", ({points}) => this.load(points[0].customdata)); });
  }

  /** What the trade-off shows, for keys and for readers aloud. */
  listDots(dots, controls, told) {
    const figures = (dot) => `${times(dot.speedup_measured)}, LPIPS ${small(dot.lpips)}`, place = this.$(".bd-dots div");
    const shown = [...dots, ...controls].map(figures).join();
    if (place.dataset.shown === shown) return; // a key may be on one of the buttons
    place.dataset.shown = shown;
    const button = (dot) => h("button", {type: "button", onclick: () => this.load([dot.schedule, dot.cutoff_block, storageOf(dot)])}, told(dot));
    place.replaceChildren(h("ul", {}, ...dots.map((dot) => h("li", {}, button(dot), ` ${figures(dot)}`)),
      ...controls.map((dot) => h("li", {}, `${dot.steps} steps without a cache ${figures(dot)}`))));
  }

  /** Show a schedule: as the sliders would say it if they can, else as one edited by hand. */
  load([kinds, cutoff, storage]) {
    if (!kinds.includes("r")) return;
    const {config} = this.state, windows = [[config.start, config.end], [0.4, 0.95], [0, 1], [0.25, 0.95]];
    for (const interval of [2, 3, 4, 5, 6]) for (const [start, end] of windows) {
      if (fixedSchedule({interval, start, end}, kinds.length) !== kinds) continue;
      this.set({config: {interval, cutoff, start, end}, storage, edited: null});
      return;
    }
    this.set({config: {cutoff}, storage, edited: kinds});
  }

  // ------------------------------------------------------------ the address

  get firstModel() { return this.settings.defaults?.model || "demo"; }

  /** Take the settings of the address; if it names another model, that is loaded first. */
  readUrl(given = new URLSearchParams(location.search), retried = false) {
    const {request, config} = this.state, changed = [];
    const number = (name, low, high, whole, into, field) => {
      if (!given.has(name)) return;
      const raw = given.get(name), value = raw.trim() === "" ? NaN : Number(raw);
      const kept = clamp(Number.isFinite(value) ? (whole ? Math.round(value) : value) : into[field], low, high);
      if (kept !== value) changed.push(`${name}=${raw} is not in [${low}, ${high}]; ${kept} is used`);
      into[field] = kept;
    };
    const among = (name, values, into) => {
      if (!given.has(name)) return;
      if (values.includes(given.get(name))) into[name] = given.get(name);
      else changed.push(`${name}=${given.get(name)} is not one of ${values.join(", ")}`);
    };
    const named = {model: this.state.model};
    among("model", this.settings.models || [this.firstModel], named);
    if (named.model !== this.state.model && !retried) { this.addressed = given; return; }
    const prompt = given.get("prompt");
    if (prompt?.trim()) request.prompt = prompt.slice(0, MOST_LETTERS);
    else if (given.has("prompt")) changed.push(`prompt is empty; “${request.prompt}” is used`);
    if (prompt?.length > MOST_LETTERS) changed.push(`prompt has ${prompt.length} letters; the first ${MOST_LETTERS} are used`);
    number("seed", 0, 2 ** 32 - 1, true, request, "seed");
    number("steps", 1, 100, true, request, "steps");
    number("guidance", 1, 20, false, request, "guidance");
    among("sampler", this.settings.samplers || ["DDIM"], request);
    number("n", 1, 6, true, config, "interval");
    number("i", 0, this.blocks - 2, true, config, "cutoff");
    number("start", 0, 1, false, config, "start");
    number("end", 0, 1, false, config, "end");
    if (config.start > config.end) {
      changed.push(`start=${config.start} exceeds end=${config.end}; end is ${config.start}`);
      config.end = config.start;
    }
    if (given.has("step")) {
      const at = {step: 0};
      number("step", 0, request.steps - 1, true, at, "step");
      this.state.pinned = at.step;
    }
    if (this.live && given.has("ada")) { number("ada", 0.2, 0.8, false, this.state, "saving"); this.state.ada = true; }
    if (this.live) among("storage", ["latest", "extrapolated"], this.state);
    among("scale", Object.keys(SCALES), this.state);
    among("mode", Object.keys(MODES), this.state);
    if (given.has("s")) {
      if (isValid(given.get("s"), request.steps)) this.state.edited = given.get("s");
      else changed.push(`s=${given.get("s")} is not a schedule of ${request.steps} steps`);
    }
    for (const name of (given.get("hide") || "").split(",").filter(Boolean)) {
      if (!this.parts.includes(name)) changed.push(`hide=${name} is not one of ${this.parts.join(", ")}`);
      for (const part of this.all("[data-part]")) if (part.dataset.part === name) part.style.display = "none";
    }
    changed.forEach((text) => this.notice(`In the address, ${text}.`));
  }

  settingsUrl() {
    const url = new URL(location.href), {request, model, config, edited, ada, saving, storage, pinned, scale, mode} = this.state;
    const unless = (usual, value) => value === usual ? null : value;
    const shown = {...request, model: unless(this.firstModel, model), n: config.interval, i: config.cutoff, start: config.start, end: config.end,
                   s: edited, step: pinned, storage: unless("latest", storage), ada: ada ? saving : null,
                   scale: unless("cosine", scale), mode: unless("wipe", mode)};
    for (const [name, value] of Object.entries(shown)) {
      if (value === null) url.searchParams.delete(name);
      else url.searchParams.set(name, value);
    }
    return url.href;
  }

  saveUrlNow() { if (!this.playing && !this.addressed) history.replaceState(history.state, "", this.settingsUrl()); }

  async copy(text, what) {
    try { await navigator.clipboard.writeText(text); this.notice(`${what} copied.`); } catch { prompt(`Copy the ${what.toLowerCase()}:`, text); }
  }

  // ------------------------------------------------------------ what the buttons do

  do_link() { this.copy(this.settingsUrl(), "Link"); }
  do_play() { if (this.playing) this.stopPlaying(); else this.play(); }
  do_unedit() { this.set({edited: null}); }
  do_stop() { if (this.waiting) this.live(`stop_${this.waiting.what}`, {}); this.next = this.waiting = null; this.stopped = true; this.render(); }
  do_measure() { this.order("measure", `${this.sceneKey()}|measure`); }
  do_animate() { this.order("animate", `${this.sceneKey()}|animate`); }

  /** What is exported: the setting and every figure. */
  facts() {
    const scene = this.scene, {picture, previews, ...run} = this.runOf(scene) || {};
    const {request, model, storage} = this.state;
    return {request, model, num_blocks: this.blocks, machine: run.machine || scene?.machine, schedule: this.kinds, cutoff_block: this.cutoff,
            storage, ...run, yardsticks: scene?.yardsticks, address: this.settingsUrl()};
  }

  do_json() { download("blockdance.json", new Blob([JSON.stringify(this.facts(), null, 2)], {type: "application/json"})); }
  do_csv() {
    const map = this.scene?.map, sources = reusedFrom(this.kinds);
    if (!map) { this.notice("The similarity map is not there yet."); return; }
    const lines = map.flatMap((values, block) => values.map((value, step) =>
      [block, step, value ?? "", KIND_NAMES[this.kinds[step]], sources[step] !== null && block <= this.cutoff].join()));
    download("similarity.csv", new Blob([["block,step,cosine,kind,reused", ...lines].join("\n") + "\n"], {type: "text/csv"}));
  }

  do_python() { this.copy(this.python(), "Python"); }

  /** A script that draws what is shown. */
  python() {
    const {request, config, edited, storage, model} = this.state, text = JSON.stringify(request.prompt), isDemo = model === "demo";
    const scheduler = isDemo && request.sampler === "DDIM" ? null : SCHEDULERS[request.sampler]; // the demo's own is DDIM
    const rule = storage === "latest" ? "" : ", storage=Extrapolated()";
    const names = [rule && "Extrapolated", edited ? "Schedule" : "ReuseConfig", "accelerate", isDemo && "load_demo_pipeline"].filter(Boolean);
    const plan = edited ? `Schedule.parse("${edited}", cutoff_block=${config.cutoff})`
      : `ReuseConfig(reuse_interval=${config.interval}, cutoff_block=${config.cutoff}, window_start=${config.start}, window_end=${config.end})`;
    const input = model.startsWith("dit-") ? `pipe.get_label_ids([${text}])` : text; // a class of ImageNet
    return [
      "import torch",
      ...(scheduler ? [`from diffusers import ${scheduler}`] : []),
      "",
      `from blockdance import ${names.join(", ")}`,
      ...(isDemo ? [] : ["from blockdance.presets import load_pipeline"]),
      "",
      isDemo ? "pipe = load_demo_pipeline()" : `pipe = load_pipeline(${JSON.stringify(model)})`,
      ...(scheduler ? [`pipe.scheduler = ${scheduler}.from_config(pipe.scheduler.config)`] : []),
      `with accelerate(pipe, ${plan}${rule}) as trace:`,
      `    image = pipe(${input}, num_inference_steps=${request.steps}, guidance_scale=${request.guidance}, ` +
        `generator=torch.Generator().manual_seed(${request.seed})).images[0]`,
      'print(trace.kinds, f"{trace.speedup_ideal:.2f}x fewer block evaluations")',
      "",
    ].join("\n");
  }

  async do_card() {
    const run = this.runOf(this.scene);
    if (!run) { this.notice("The pictures are not there yet."); return; }
    const card = h("canvas", {width: 1200, height: 630}), c = card.getContext("2d"), {request} = this.state;
    const control = this.controlOf(this.scene);
    const write = (text, x, y, font, colour = "#1f2933") => {
      c.font = `${font} system-ui, sans-serif`;
      c.fillStyle = colour;
      c.fillText(text, x, y, 1140);
    };
    c.fillStyle = "#ffffff"; c.fillRect(0, 0, 1200, 630);
    write("BlockDance Explorer", 30, 52, "600 30px");
    write(`“${request.prompt}”, seed ${request.seed}, ${request.steps} steps, guidance ${request.guidance}, ${request.sampler}`, 30, 88, "20px", "#52606d");
    const columns = [
      ["baseline", "Baseline", "all blocks on every step"],
      ["variant", "BlockDance", `${times(this.ideal)} ideal${run.speedup_measured ? `, ${times(run.speedup_measured)} measured` : ""}`],
      ["control", control ? `Fewer steps: ${control.steps}` : "Fewer steps", control ? `${times(control.speedup_ideal)} ideal` : "not drawn yet"],
    ];
    columns.forEach(([name, label, figures], index) => {
      const x = 30 + 270 * index;
      c.drawImage(this.$(`[data-picture=${name}]`), x, 110, 250, 250);
      write(label, x, 382, "600 16px");
      write(figures, x, 402, "16px", "#52606d");
    });
    const map = h("canvas", {}), shape = this.mapShape(330, Math.floor(226 / this.blocks)); // as high as the pictures and their captions
    this.paintMap(map, this.scene, shape, 2, "#52606d");
    c.drawImage(map, 850, 110, shape.width, shape.height);
    write(`LPIPS ${small(run.lpips)}, SSIM ${run.ssim.toFixed(4)} (difference from the baseline); ${this.coverage()}`, 30, 440, "20px");
    if (control) write(`Fewer steps at about the same cost: LPIPS ${small(control.lpips)}, SSIM ${control.ssim.toFixed(4)}`, 30, 470, "20px");
    const cell = 1140 / this.kinds.length;
    [...this.kinds].forEach((kind, step) => { c.fillStyle = KIND_COLOURS[kind]; c.fillRect(30 + step * cell, 500, cell - 2, 24); });
    write("one cell a step: grey full, blue cache, orange reuse. BlockDance (Zhang et al., CVPR 2025)", 30, 556, "16px", "#52606d");
    write(`measured on ${run.machine || this.scene.machine}`, 30, 586, "16px", "#52606d");
    const blob = await new Promise((resolve) => card.toBlob(resolve, "image/png"));
    download("blockdance.png", withText(new Uint8Array(await blob.arrayBuffer()), "blockdance", JSON.stringify(this.facts())));
  }

  // ------------------------------------------------------------ the tour

  do_tour() {
    this.tour = TOUR.filter(({at}) => this.$(`[data-part=${at}]`)?.getClientRects().length); // what is hidden is skipped
    this.showTour(0);
  }

  showTour(index) {
    const {tour} = this, card = this.$(".bd-tour"), step = tour[index];
    this.all(".bd-lit").forEach((element) => element.classList.remove("bd-lit"));
    card.hidden = !step;
    this.tourStep = step || null;
    if (!step) { this.$("[data-do=tour]").focus({preventScroll: true}); return; }
    const target = this.$(`[data-part=${step.at}]`);
    target.classList.add("bd-lit");
    target.scrollIntoView({block: "center", behavior: calm() ? "auto" : "smooth"});
    this.tourFrom = structuredClone(this.state.config);
    const button = (text, action, properties = {}) => h("button", {type: "button", onclick: action, ...properties}, text);
    card.replaceChildren(
      h("small", {}, `${index + 1} of ${tour.length}`), h("h3", {}, step.title), h("p", {}, step.text),
      h("p", {className: "bd-done", role: "status"}),
      h("div", {className: "bd-buttons"}, ...(step.act ? [button(step.label, () => step.act.call(this))] : []),
        ...(index ? [button("Back", () => this.showTour(index - 1))] : []),
        button(index + 1 < tour.length ? "Next" : "Finish", () => this.showTour(index + 1), {className: "primary"}),
        button("Skip", () => this.showTour(-1))));
    card.focus({preventScroll: true});
    step.check?.call(this);
  }

  tourDone(text) { const place = this.$(".bd-tour .bd-done"); if (place && place.textContent !== text) place.textContent = text; }
}

const TOUR = [
  {at: "pictures", title: "Compare", label: "Show the octopus",
   text: "Both pictures start from the same noise. On the right BlockDance skipped most blocks on some steps. Can you tell? Drag the wipe, or try “difference ×8”.",
   act() { this.set({request: {prompt: "octopus", seed: 0, steps: 30, guidance: 4}, config: {interval: 2, cutoff: 9, start: 0.4, end: 0.95}, edited: null}); }},
  {at: "pictures", title: "Watch structure appear", label: "Play the steps",
   text: "Each step expects a picture. Play them: the shape is there after a third of the steps; what follows is texture.", act() { this.play(); }},
  {at: "map", title: "Why the map is bright", label: "Spread the values near 1",
   text: "Each cell says how alike a block's output is to its own, one step earlier. Most are nearly 1: computed again for almost nothing. That is what BlockDance reuses.",
   act() { this.state.scale = "log"; this.render(); }},
  {at: "map", title: "Drag the cutoff", label: "Move it for me",
   text: "Drag the orange line up or down (or use the arrow keys): more blocks skipped, more speed. Watch the number and the difference.",
   act() { this.set({config: {cutoff: this.cutoff >= this.blocks - 2 ? 6 : this.blocks - 2}}); },
   check() { if (this.cutoff !== this.tourFrom.cutoff) this.tourDone(`Done: cutoff ${this.cutoff}, ideal ${times(this.ideal)}.`); }},
  {at: "pictures", title: "Break it", label: "Reuse from the first step",
   text: "Reuse while the structure is still forming, and the picture becomes another one. Early outputs are alike, yet a reuse step does " +
     "not read the current latent, and each later step carries its error on; the paper starts at 40 %.",
   act() {
     this.set({request: {prompt: "castle cake", seed: 1, steps: 30, guidance: 8}, config: {interval: 4, cutoff: 12, start: 0, end: 1},
               edited: null, pinned: null});
   },
   check() {
     const run = this.runOf(this.scene);
     if (run && this.state.config.start < 0.2) this.tourDone(`LPIPS ${small(run.lpips)} at ${times(run.speedup_ideal)}.`);
   }},
  {at: "ada", title: "Let Ada decide", label: "Switch it on",
   text: "So far every picture got the same schedule. BlockDance-Ada is a small network that looks at the latent after 40 % of the steps and decides the rest for this picture alone. Below the map you see how probable it found a cache step, on each step.",
   act() { this.set({request: {prompt: "house with garden", seed: 0, steps: 30, guidance: 4}, ada: true, edited: null}); },
   check() { if (this.decision) this.tourDone(`Done: ${this.decision.schedule}, ideal ${times(this.ideal)}.`); }},
  {at: "numbers", title: "Your turn: beat 1.4× at LPIPS 0.05", label: "Back to the paper's window",
   text: "Find a setting with an ideal speedup of at least 1.4× and an LPIPS of at most 0.05. Then look at the control: would fewer steps have done the same?",
   act() { this.set({request: {prompt: "house with garden", seed: 0, guidance: 4}, config: {interval: 2, cutoff: 9, start: 0.4, end: 0.95}, edited: null}); },
   check() {
     const run = this.runOf(this.scene), control = this.controlOf(this.scene);
     if (!run || run.speedup_ideal < 1.4 || run.lpips > 0.05) { this.tourDone(""); return; }
     const rival = control ? `${control.steps} steps: ${times(control.speedup_ideal)} at ${small(control.lpips)}.` : "";
     this.tourDone(`Done: ${times(run.speedup_ideal)} at LPIPS ${small(run.lpips)}. ${rival}`);
   }},
];

// ---------------------------------------------------------------- files

function dataBlob(address) {
  const [head, body] = address.split(","), bytes = Uint8Array.from(atob(body), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], {type: head.slice(5, head.indexOf(";"))});
}

/** CRC-32 as PNG wants it. */
function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) { crc ^= byte; for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0); }
  return ~crc >>> 0;
}

/** A PNG with a text entry after its header; letters beyond ASCII are written as \\u escapes. */
function withText(png, keyword, text) {
  const ascii = text.replace(/[^\x20-\x7e]/g, (letter) => "\\u" + letter.charCodeAt(0).toString(16).padStart(4, "0"));
  const body = new TextEncoder().encode(`tEXt${keyword}\0${ascii}`), chunk = new Uint8Array(body.length + 8), view = new DataView(chunk.buffer);
  view.setUint32(0, body.length - 4);
  chunk.set(body, 4);
  view.setUint32(body.length + 4, crc32(body));
  const header = 33; // signature and IHDR
  return new Blob([png.slice(0, header), chunk, png.slice(header)], {type: "image/png"});
}

window.BlockDance = {mount: (element, options) => new Explorer(element, options), fixedSchedule, idealSpeedup, isValid, toggled, reusedFrom};
})();
