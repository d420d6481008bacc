// Checks the chain that this page draws against the log that it carries: hashes, links, Merkle root, the owner's
// signature, and that the figures drawn are those recorded. What the log's rules ask for, and whether checkpoints still
// agree, `capsfl verify` alone can tell.
"use strict";

const text = new TextEncoder();
const hex = (bytes) => Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
const unhex = (digits) => Uint8Array.from(digits.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const join = (...parts) => Uint8Array.from(parts.flatMap((part) => Array.from(part)));
const sha256 = async (...parts) => new Uint8Array(await crypto.subtle.digest("SHA-256", join(...parts)));
const leaf = (data) => sha256([0], data);
const node = (left, right) => sha256([1], left, right);

function insist(holds, what) {
  if (!holds) throw new Error(what);
}

// The one byte string of a value, as the ledger signs it: keys are sorted in the log already.
function canonical(value) {
  const escaped = (character) => "\\u" + character.charCodeAt(0).toString(16).padStart(4, "0");
  return text.encode(JSON.stringify(value).replace(/[\u007f-\uffff]/g, escaped));
}

async function root(leaves) {
  if (leaves.length === 1) return leaves[0];
  let split = 1;
  while (split * 2 < leaves.length) split *= 2;
  return node(await root(leaves.slice(0, split)), await root(leaves.slice(split)));
}

function frames(log) {
  const found = [];
  for (let at = 0; at < log.length; ) {
    insist(at + 8 <= log.length, "the log ends within a block");
    const end = at + 8 + new DataView(log.buffer, at, 4).getUint32(0);
    insist(end <= log.length, "the log ends within a block");
    found.push(JSON.parse(new TextDecoder().decode(log.subarray(at + 8, end))));
    at = end;
  }
  return found;
}

// y² = x³ - 3x + b on P-256, whose prime is 3 modulo 4.
function uncompressed(key) {
  const p = 2n ** 256n - 2n ** 224n + 2n ** 192n + 2n ** 96n - 1n;
  const b = 0x5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604bn;
  const x = BigInt("0x" + key.slice(2));
  let [power, square, y] = [(p + 1n) / 4n, (x * x * x - 3n * x + b) % p, 1n];
  for (; power; power >>= 1n, square = (square * square) % p) if (power & 1n) y = (y * square) % p;
  if ((y & 1n) !== BigInt("0x" + key.slice(0, 2)) - 2n) y = p - y;
  return unhex("04" + key.slice(2) + y.toString(16).padStart(64, "0"));
}

async function isSigned(genesis, size, top, signature) {
  const body = canonical({ chain_id: genesis.chain_id, public_key: genesis.public_key, root: hex(top), size });
  const type = `application/vnd.capsfl.head.v1+json;chain=${genesis.chain_id}`;
  const message = join(text.encode(`DSSEv1 ${type.length} ${type} ${body.length} `), body);
  const curve = { name: "ECDSA", namedCurve: "P-256" };
  const key = await crypto.subtle.importKey("raw", uncompressed(genesis.public_key), curve, false, ["verify"]);
  return crypto.subtle.verify({ name: "ECDSA", hash: "SHA-256" }, key, unhex(signature), message);
}

async function check(section) {
  const encoded = section.querySelector("script[data-log]").textContent.trim();
  const blocks = frames(Uint8Array.from(atob(encoded), (character) => character.charCodeAt(0)));
  const leaves = [];
  let previous = "0".repeat(64);
  for (const [height, { header, records }] of blocks.entries()) {
    insist(header.height === height && header.previous === previous, `block ${height} does not follow`);
    const hashes = await Promise.all(records.map((record) => leaf(canonical(record))));
    insist(hex(await root(hashes)) === header.records_root, `block ${height}: its records are not those it names`);
    leaves.push(await leaf(canonical(header)));
    previous = hex(leaves[height]);
  }
  const [top, genesis] = [await root(leaves), blocks[0].records[0]];
  insist(await isSigned(genesis, blocks.length, top, blocks.at(-1).signature), "the owner did not sign this log");
  const facts = { root: hex(top), head: previous, chain_id: genesis.chain_id, signer: genesis.public_key };
  for (const [name, value] of Object.entries(facts)) {
    const shown = section.querySelector(`[data-fact="${name}"]`);
    insist(shown === null || shown.textContent === value, `the page shows another ${name} than the log's`);
  }
  const shown = section.querySelector('[data-fact="blocks"]').textContent;
  insist(Number(shown) === blocks.length, `the page counts ${shown} blocks, the log ${blocks.length}`);
  // Hospitals may join at any height.
  const joined = blocks.flatMap(({ records }) => records).filter((record) => record.type === "registration");
  const ids = new Map(joined.map((record) => [record.name, record.hospital_id]));
  for (const drawn of section.querySelectorAll("[data-block]")) checkRound(drawn, blocks[drawn.dataset.block], ids);
  return `this page's chain is that of the log it carries: ${blocks.length} blocks, linked, hashed and signed`;
}

function checkRound(drawn, block, ids) {
  const where = `block ${drawn.dataset.block}`;
  const round = block?.records.find((record) => record.type === "round");
  insist(round && drawn.dataset.round === `${round.task} ${round.round}`, `${where} is not the round drawn`);
  const digest = drawn.querySelector("[data-digest]");
  insist(!digest || digest.textContent === round.parameters_digest.slice(0, 10), `${where}: another digest is drawn`);
  const epsilon = drawn.querySelector("[data-epsilon]");
  if (epsilon) {
    const shown = Number(epsilon.textContent.replace("\u2212", "-"));
    // It is drawn with three digits.
    const near = Math.abs(shown - Number(round.epsilon)) <= 0.01 * Number(round.epsilon);
    insist(round.epsilon !== null && near, `${where}: another ε is drawn`);
  }
  const weights = new Map(block.records.find((record) => record.type === "decision")?.weights ?? []);
  for (const cell of drawn.querySelectorAll("[data-vote]")) {
    const weight = weights.get(ids.get(cell.dataset.vote));
    const expected = weight === undefined ? "out-voted" : (100 * Number(weight)).toFixed(1);
    insist(cell.textContent === expected, `${where}: another weight of ${cell.dataset.vote} is drawn`);
  }
}

for (const section of document.querySelectorAll("[data-chain]")) {
  const verdict = section.querySelector("[data-verdict]");
  const say = (tone, words) => {
    verdict.className = `tone ${tone}`;
    verdict.textContent = words;
  };
  if (globalThis.crypto?.subtle === undefined) say("warn", "not checked: this browser has no SubtleCrypto here; run capsfl verify");
  else check(section).then((words) => say("good", `OK: ${words}`), (error) => say("bad", `FAILED: ${error.message}`));
}
