// Asking: one question, answered from stored KV, and by full prefill beside it if that is wished for.

import { chat, get } from "./api.js";
import { byId, copyOf, shortName } from "./dom.js";
import { refresh, takeFiles } from "./store.js";

let model = null;
let running = null; // AbortController of the question under way

function problem(message) {
  byId("problem").hidden = !message;
  byId("problem").textContent = message || "";
}

function busy(is) {
  byId("send").disabled = is;
  byId("stop").hidden = !is;
}

async function ask(question) {
  const compare = byId("compare").checked;
  problem("");
  byId("welcome").hidden = true;
  byId("result").hidden = false;
  byId("result").classList.toggle("compared", compare);
  byId("answers").replaceChildren();
  byId("sources").replaceChildren();
  byId("no-sources").hidden = true;
  byId("said").textContent = "";
  running = new AbortController();
  busy(true);
  try {
    const stored = await answer(question, null, "From stored KV", running.signal);
    if (compare) {
      const full = await answer(question, "full", "By full prefill", running.signal);
      const times = full.ttft_s / stored.ttft_s;
      byId("said").textContent = `First token after ${seconds(stored.ttft_s)} seconds from stored KV, ${seconds(full.ttft_s)} by full prefill: ${times.toFixed(1)} times.`;
    }
  } catch (error) {
    problem(error.name === "AbortError" ? "Stopped." : error.message);
  } finally {
    running = null;
    busy(false);
    await refresh(problem);
  }
}

const seconds = (value) => value.toFixed(2);

// One answer in its own column; returns its timings.
async function answer(question, linking, title, signal) {
  const node = copyOf("answer-template"), text = node.querySelector(".text"), clock = node.querySelector(".seconds");
  node.querySelector("h2").textContent = title;
  node.setAttribute("aria-label", title);
  byId("answers").append(node);
  const started = performance.now();
  let ticking = setInterval(() => { clock.textContent = seconds((performance.now() - started) / 1000); }, 50);
  const stopClock = () => { clearInterval(ticking); ticking = null; };
  const body = { model, messages: [{ role: "user", content: question }], stream_options: { include_usage: true } };
  let extension = null, usage = null;
  try {
    for await (const event of chat(linking ? { ...body, linking } : body, signal)) {
      const choice = event.choices[0];
      if (choice?.delta.content) {
        if (ticking) stopClock();
        text.textContent += choice.delta.content;
      }
      if (event.kvlink && !linking) showSources(event.kvlink.sources);
      if (choice?.finish_reason) extension = event.kvlink;
      if (event.usage) usage = event.usage;
    }
  } finally {
    stopClock();
    node.setAttribute("aria-busy", "false");
  }
  clock.textContent = seconds(extension.timings.ttft_s);
  const { reused, computed } = extension.tokens;
  const rate = usage.completion_tokens / Math.max(extension.timings.decode_s, 0.001);
  node.querySelector(".about").textContent = `${reused.toLocaleString("en")} tokens reused, ${computed.toLocaleString("en")} computed; then ${rate.toFixed(0)} tokens a second`;
  byId("said").textContent = `${title}: ${text.textContent}`;
  return extension.timings;
}

function showSources(sources) {
  byId("no-sources").hidden = sources.length > 0;
  byId("sources").replaceChildren(...sources.map((source) => {
    const node = copyOf("source-template"), how = node.querySelector(".how");
    node.querySelector(".name").textContent = shortName(source.document);
    node.querySelector(".name").title = source.document;
    how.textContent = source.reused ? "reused" : "computed";
    how.classList.toggle("reused", source.reused);
    const score = source.score === null ? "" : `, similarity ${source.score.toFixed(2)}`;
    node.querySelector(".facts").textContent = `chunk ${source.chunk + 1}, ${source.num_tokens} tokens${score}`;
    node.querySelector(".text").textContent = source.text;
    return node;
  }));
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = byId("question").value.trim();
  if (question && model && !running) ask(question);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => running?.abort());

takeFiles(problem);
refresh(problem);
get("/v1/models").then(
  (list) => {
    model = list.data[0].id;
    byId("model").textContent = model;
  },
  (error) => problem(`The server cannot be reached: ${error.message}`),
);
