// Opens a page of experiments.export in headless Chromium, drops files on it or draws, and prints what it answers as JSON.
//
//     node try.mjs CHROMIUM PAGE '{"width": 390, "dark": true, "drop": ["three.png"], "draw": true, "shot": "page.png"}'
import {pathToFileURL} from "node:url";
import {chromium} from "playwright-core";

const [executablePath, path, text] = process.argv.slice(2);
const {width = 1200, dark = false, drop = [], draw = false, shot = null} = JSON.parse(text);
const quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({executablePath, args: quiet});
const page = await browser.newPage({viewport: {width, height: 900}, colorScheme: dark ? "dark" : "light"});
const asked = [], errors = [];
page.on("request", (request) => /^https?:/.test(request.url()) && asked.push(request.url()));
page.on("pageerror", (error) => errors.push(String(error)));
await page.goto(pathToFileURL(path).href);
await page.waitForFunction(() => globalThis.kdjax, null, {timeout: 60000});

async function answers() {
  await page.waitForFunction(() => kdjax.answers || document.getElementById("problem").textContent, null, {timeout: 60000});
  return page.evaluate(() => ({pixels: kdjax.pixels, answers: kdjax.answers, map: kdjax.map, problem: document.getElementById("problem").textContent}));
}

const found = [];
for (const file of drop) {
  await page.evaluate(() => { kdjax.answers = null; });
  await page.setInputFiles("#file", file);
  found.push(await answers());
}
if (draw) {
  await page.evaluate(() => { kdjax.answers = null; });
  const box = await page.locator("#draw").boundingBox();
  const at = (x, y) => [box.x + x * box.width, box.y + y * box.height];
  await page.mouse.move(...at(0.5, 0.12)); // a one
  await page.mouse.down();
  for (let y = 0.12; y <= 0.88; y += 0.04) await page.mouse.move(...at(0.5, y));
  await page.mouse.up();
  found.push(await answers());
}
if (shot) await page.screenshot({path: shot, fullPage: true});
const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
console.log(JSON.stringify({ready: await page.evaluate(() => kdjax.ready), found, asked, errors, overflow, text: await page.innerText("body")}));
await browser.close();
