// The store beside the question: its numbers, its documents, and files on their way into it.

import { get, remove, upload } from "./api.js";
import { byId, copyOf, shortName } from "./dom.js";

const SHOWN = 100;
const STAGES = { encoding: "chunk", embedding: "vector" }; // of so many
let newest = 0; // of several requests under way only the last one made is shown

export async function refresh(problem) {
  const own = ++newest;
  try {
    const [numbers, list] = await Promise.all([get("/v1/store"), get(`/v1/documents?limit=${SHOWN}`)]);
    if (own !== newest) return;
    byId("n-documents").textContent = numbers.documents.toLocaleString("en");
    byId("n-tokens").textContent = numbers.tokens.toLocaleString("en");
    byId("n-bytes").textContent = bytes(numbers.bytes);
    byId("n-rate").textContent = numbers.hit_rate === null ? "–" : `${Math.round(numbers.hit_rate * 100)} %`;
    byId("documents").replaceChildren(...list.data.map((item) => row(item, problem)));
    byId("more").hidden = !list.has_more;
    byId("more").textContent = `and ${numbers.documents - list.data.length} more`;
    byId("welcome").textContent = numbers.documents ? "Ask about the documents of this store. They are not read again." : "Add a document, then ask about it.";
  } catch (error) {
    problem(`The store cannot be shown: ${error.message}`);
  }
}

function row(item, problem) {
  const node = copyOf("document-template");
  node.querySelector(".name").textContent = shortName(item.id);
  node.querySelector(".name").title = item.id;
  node.querySelector(".facts").textContent = `${item.chunks} ${item.chunks === 1 ? "chunk" : "chunks"}, ${item.tokens.toLocaleString("en")} tokens`;
  const button = node.querySelector("button");
  const ask = (isSure) => {
    button.classList.toggle("sure", isSure);
    button.textContent = isSure ? "Really?" : "Delete";
    button.setAttribute("aria-label", `${isSure ? "Really delete" : "Delete"} ${shortName(item.id)}`);
  };
  ask(false);
  button.addEventListener("blur", () => ask(false));
  button.addEventListener("mousedown", (event) => {
    if (button.classList.contains("sure")) event.preventDefault(); // where a press takes focus away, it would take the question back
  });
  button.addEventListener("click", async () => {
    if (!button.classList.contains("sure")) {
      button.focus(); // not every browser gives it to what is clicked
      return ask(true);
    }
    button.disabled = true;
    try {
      await remove(item.id);
    } catch (error) {
      problem(`Not deleted: ${error.message}`);
    }
    await refresh(problem);
  });
  return node;
}

function bytes(count) {
  if (count < 2 ** 20) return `${Math.ceil(count / 2 ** 10)} KiB`;
  return count < 2 ** 30 ? `${(count / 2 ** 20).toFixed(1)} MiB` : `${(count / 2 ** 30).toFixed(1)} GiB`;
}

export function takeFiles(problem) {
  const input = byId("files"), drop = byId("drop");
  input.addEventListener("change", () => { add([...input.files], problem); input.value = ""; });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") add([...event.dataTransfer.files], problem);
    });
  }
}

async function add(files, problem) {
  if (!files.length) return;
  const node = copyOf("job-template"), bar = node.querySelector("progress"), state = node.querySelector(".state");
  node.querySelector(".name").textContent = files.length === 1 ? files[0].name : `${files.length} files`;
  state.textContent = "sending";
  byId("jobs").prepend(node);
  try {
    let job = await upload(files);
    while (job.status === "queued" || job.status === "running") {
      const stage = STAGES[job.stage] ?? job.stage ?? "waiting";
      state.textContent = job.total ? `${stage} ${job.done} of ${job.total}` : stage;
      if (job.total) { bar.max = job.total; bar.value = job.done; }
      await new Promise((resolve) => setTimeout(resolve, 300));
      job = await get(`/v1/jobs/${job.id}`);
    }
    if (job.status === "failed") throw new Error(job.error);
    state.textContent = `${job.report.encoded_chunks} read, ${job.report.reused_chunks} known`;
    show(node, job.skipped);
  } catch (error) {
    node.classList.add("failed");
    state.textContent = "not added";
    show(node, [error.message]);
  }
  bar.remove();
  await refresh(problem);
}

function show(node, lines) {
  node.querySelector(".skipped").replaceChildren(...lines.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  }));
}
