// One page: its networks, its runtime and what it knows are inside it. See experiments/web/__init__.py.
import {loadAndCompile, loadLiteRt, Tensor} from "@litertjs/core";

const page = JSON.parse(document.getElementById("page").textContent);
const [height, width, channels] = page.shape;
const byId = (id) => document.getElementById(id);
const state = {pixels: null, answers: null, ready: false}; // what tests read

// Networks

async function unpacked(text) {
  const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function load() {
  self.Module = {wasmBinary: await unpacked(page.runtime.wasm)};
  const loader = new Blob([await unpacked(page.runtime.loader)], {type: "text/javascript"});
  await loadLiteRt(`${URL.createObjectURL(loader)}#litert.js`);
  for (const network of page.networks) {
    network.model = await loadAndCompile(await unpacked(network.file), {accelerator: "wasm"});
  }
}

async function logits(network, pixels) {
  const input = new Tensor(pixels, [1, height, width, channels]);
  const start = performance.now();
  const [output] = await network.model.run(input);
  const values = Array.from(output.toTypedArray()), took = performance.now() - start;
  input.delete();
  output.delete();
  return {values, took};
}

function probabilities(values) {
  const most = Math.max(...values);
  const powers = values.map((v) => Math.exp(v - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((p) => p / sum);
}

// Pixels, as in training: kdjax.data.photos

function lanczos(x) {
  if (x === 0) return 1;
  if (Math.abs(x) >= 3) return 0;
  const t = Math.PI * x;
  return 3 * Math.sin(t) * Math.sin(t / 3) / (t * t);
}

// Weights of a pass of Pillow's resize: for each new pixel, the first old one and its weights.
function weights(size, from, to) {
  const scale = (to - from) / size, stretch = Math.max(scale, 1), reach = 3 * stretch;
  return (whole) => Array.from({length: size}, (_, i) => {
    const centre = from + (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0), last = Math.min(Math.trunc(centre + reach + 0.5), whole);
    const w = Array.from({length: last - first}, (_, j) => lanczos((first + j - centre + 0.5) / stretch));
    const sum = w.reduce((a, b) => a + b, 0);
    return {first, w: w.map((v) => v / sum)};
  });
}

const byte = (v) => Math.min(255, Math.max(0, Math.floor(v + 0.5)));

// image: {data, width, height, channels}; box: left, top, right, bottom
function resized(image, box) {
  const c = image.channels;
  const across = weights(width, box[0], box[2])(image.width), down = weights(height, box[1], box[3])(image.height);
  const middle = new Uint8ClampedArray(image.height * width * c), out = new Uint8Array(height * width * c);
  for (let y = 0; y < image.height; y++) for (let x = 0; x < width; x++) for (let k = 0; k < c; k++) {
    const {first, w} = across[x];
    let sum = 0;
    for (let j = 0; j < w.length; j++) sum += w[j] * image.data[(y * image.width + first + j) * c + k];
    middle[(y * width + x) * c + k] = byte(sum);
  }
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) for (let k = 0; k < c; k++) {
    const {first, w} = down[y];
    let sum = 0;
    for (let j = 0; j < w.length; j++) sum += w[j] * middle[((first + j) * width + x) * c + k];
    out[(y * width + x) * c + k] = byte(sum);
  }
  return out;
}

function prepared(image) {
  if (image.width === width && image.height === height) return Uint8Array.from(image.data);
  let box = [0, 0, image.width, image.height];
  if (page.resize === "cover") { // the largest part with the proportions of the networks' images, from the middle
    const wanted = width / height, has = image.width / image.height;
    if (has > wanted) {
      const cut = (image.width - image.height * wanted) / 2;
      box = [cut, 0, image.width - cut, image.height];
    } else if (has < wanted) {
      const cut = (image.height - image.width / wanted) / 2;
      box = [0, cut, image.width, image.height - cut];
    }
  }
  return resized(image, box);
}

async function decoded(blob) {
  const options = {imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none"};
  const bitmap = await createImageBitmap(blob, options);
  const canvas = Object.assign(document.createElement("canvas"), {width: bitmap.width, height: bitmap.height});
  const context = canvas.getContext("2d", {willReadFrequently: true});
  context.fillStyle = "white";
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const {data} = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const count = bitmap.width * bitmap.height, out = new Uint8Array(count * channels);
  for (let i = 0; i < count; i++) {
    const [r, g, b] = data.subarray(4 * i, 4 * i + 3);
    if (channels === 1) out[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else out.set([r, g, b], 3 * i);
  }
  return {data: out, width: bitmap.width, height: bitmap.height, channels};
}

// A drawing, cut to its ink, and put where the data set has its digits
function drawn() {
  const canvas = byId("draw"), {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let left = canvas.width, right = -1, top = canvas.height, bottom = -1;
  for (let y = 0; y < canvas.height; y++) for (let x = 0; x < canvas.width; x++) {
    if (data[4 * (y * canvas.width + x)] > 32) {
      left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
    }
  }
  if (right < 0) return null;
  const side = Math.max(right - left, bottom - top) + 1, room = side * page.draw.margin;
  const size = Math.ceil(side + 2 * room), x0 = (left + right + 1 - size) / 2, y0 = (top + bottom + 1 - size) / 2;
  const square = Object.assign(document.createElement("canvas"), {width: size, height: size});
  const context = square.getContext("2d", {willReadFrequently: true});
  context.fillRect(0, 0, size, size);
  context.drawImage(canvas, -x0, -y0);
  const cut = context.getImageData(0, 0, size, size).data;
  const image = {data: new Uint8Array(size * size), width: size, height: size, channels: 1};
  for (let i = 0; i < size * size; i++) image.data[i] = cut[4 * i];
  return resized(image, [0, 0, size, size]);
}

// Answers

const percent = (p) => `${(100 * p).toFixed(1)} %`;
const milliseconds = (t) => (t < 0.095 ? `${Math.round(1000 * t)} µs` : `${t.toFixed(t < 10 ? 2 : 0)} ms`);
const middle = (list) => list.sort((a, b) => a - b)[list.length >> 1];

// Browsers round their clock to a tenth of a millisecond or more, so quick networks are timed in batches.
async function answer(network, pixels) {
  const first = await logits(network, pixels), times = [];
  const batch = Math.max(1, Math.ceil(5 / Math.max((await logits(network, pixels)).took, 0.02)));
  for (const until = performance.now() + 150; times.length < 5 || performance.now() < until;) {
    const start = performance.now();
    for (let i = 0; i < batch; i++) await logits(network, pixels);
    times.push((performance.now() - start) / batch);
  }
  return {
    role: network.role,
    logits: first.values,
    probabilities: probabilities(first.values),
    latency: middle(times),
    runs: batch * times.length,
  };
}

function shown(found, network) {
  const order = found.probabilities.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  const box = Object.assign(document.createElement("div"), {className: `answer ${found.role}`});
  const title = Object.assign(document.createElement("h3"), {textContent: `${network.title}: ${page.classes[order[0][1]]}`});
  const note = `${milliseconds(found.latency)} an image (over ${found.runs} runs), ${network.size}`;
  title.append(Object.assign(document.createElement("span"), {textContent: note}));
  box.append(title);
  order.forEach(([p, i], rank) => {
    const row = Object.assign(document.createElement("div"), {className: rank ? "row" : "row first"});
    const bar = Object.assign(document.createElement("span"), {className: "bar"});
    bar.append(document.createElement("i"));
    bar.firstChild.style.width = percent(p).replace(" ", "");
    row.append(Object.assign(document.createElement("span"), {textContent: page.classes[i], title: page.classes[i]}), bar);
    row.append(Object.assign(document.createElement("span"), {textContent: percent(p)}));
    box.append(row);
  });
  return box;
}

// Where the student looks: how much less probable its answer is with a patch of the mean colour in the way
async function occluded(network, pixels, whole) {
  const best = whole.indexOf(Math.max(...whole));
  const patch = Math.max(2, Math.round(Math.min(height, width) / 5)), step = Math.max(1, patch >> 1);
  const fall = new Float64Array(height * width), seen = new Float64Array(height * width);
  for (let top = 1 - patch; top < height; top += step) for (let left = 1 - patch; left < width; left += step) {
    const hidden = pixels.slice(), inside = [];
    for (let y = Math.max(top, 0); y < Math.min(top + patch, height); y++) {
      for (let x = Math.max(left, 0); x < Math.min(left + patch, width); x++) {
        inside.push(y * width + x);
        for (let k = 0; k < channels; k++) hidden[(y * width + x) * channels + k] = Math.round(255 * page.mean[k]);
      }
    }
    const less = whole[best] - probabilities((await logits(network, hidden)).values)[best];
    for (const i of inside) { fall[i] += less; seen[i] += 1; }
  }
  return Array.from(fall, (f, i) => Math.max(f / Math.max(seen[i], 1), 0));
}

function paint(canvas, colour) {
  Object.assign(canvas, {width, height});
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < height * width; i++) image.data.set(colour(i), 4 * i);
  context.putImageData(image, 0, 0);
}

async function ask(pixels, caption) {
  if (!pixels || !state.ready) return;
  Object.assign(state, {pixels: Array.from(pixels), answers: null});
  byId("problem").textContent = "";
  paint(byId("seen"), (i) => (channels === 1 ? [pixels[i], pixels[i], pixels[i], 255] : [...pixels.subarray(3 * i, 3 * i + 3), 255]));
  paint(byId("where"), () => [0, 0, 0, 0]);
  byId("caption").textContent = caption;
  const answers = [], box = byId("answers");
  for (const network of page.networks) answers.push(await answer(network, pixels));
  box.replaceChildren(...answers.map((found, i) => shown(found, page.networks[i])));
  const map = await occluded(page.networks[0], pixels, answers[0].probabilities), most = Math.max(...map, 1e-9);
  paint(byId("where"), (i) => [255, 120, 0, Math.round(170 * map[i] / most)]);
  byId("look").hidden = false;
  Object.assign(state, {answers, map});
}

async function take(blob) {
  try {
    await ask(prepared(await decoded(blob)), `What the networks are given: ${width} × ${height} pixels.`);
  } catch (error) {
    byId("problem").textContent = `This is no image that the browser can read (${error.message}).`;
  }
}

// The page

function listen() {
  const drop = byId("drop"), file = byId("file");
  file.addEventListener("change", () => file.files[0] && take(file.files[0]));
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", () => drop.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => event.clipboardData.files[0] && take(event.clipboardData.files[0]));
  byId("show").addEventListener("change", (event) => { byId("where").style.display = event.target.checked ? "" : "none"; });
  if (page.draw) board();
}

function board() {
  const canvas = byId("draw"), context = canvas.getContext("2d", {willReadFrequently: true});
  byId("pad").hidden = false;
  byId("ask").textContent = page.draw.ask;
  const clear = () => { context.fillStyle = "black"; context.fillRect(0, 0, canvas.width, canvas.height); };
  clear();
  byId("clear").addEventListener("click", clear);
  Object.assign(context, {lineWidth: page.draw.stroke, lineCap: "round", lineJoin: "round", strokeStyle: "white"});
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
  };
  let drawing = false;
  canvas.addEventListener("pointerdown", (event) => {
    drawing = true;
    canvas.setPointerCapture(event.pointerId);
    context.beginPath();
    context.moveTo(...at(event));
    context.lineTo(...at(event));
    context.stroke();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drawing) return;
    context.lineTo(...at(event));
    context.stroke();
  });
  const done = () => {
    if (drawing) ask(drawn(), `Your drawing, cut and shrunk to ${width} × ${height} pixels.`);
    drawing = false;
  };
  canvas.addEventListener("pointerup", done);
  canvas.addEventListener("pointercancel", done);
}

byId("about").textContent = page.about;
byId("origin").textContent = page.origin;
listen();
try {
  await load();
  state.ready = true;
  byId("state").textContent = page.draw ? "Draw, or drop an image." : "Drop an image.";
} catch (error) {
  byId("state").textContent = `The networks cannot run in this browser: ${error.message}`;
}
globalThis.kdjax = state;
