// What the page asks the server. Everything that comes back is data; nothing of it is ever made markup.

export class Refused extends Error {}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* no JSON: the status has to do */ }
  if (response.status === 429) message = `The queue is full. Try again in ${response.headers.get("Retry-After") || "a few"} s.`;
  throw new Refused(message);
}

export async function get(path) {
  return (await checked(await fetch(path))).json();
}

export async function remove(documentId) {
  const name = encodeURIComponent(documentId); // "/" too: a browser would take ".." in a path for the folder above
  return (await checked(await fetch(`/v1/documents/${name}`, { method: "DELETE" }))).json();
}

export async function upload(files) {
  const form = new FormData();
  for (const file of files) form.append("files", file, file.name);
  return (await checked(await fetch("/v1/documents", { method: "POST", body: form }))).json();
}

// The events of a streamed answer, in order; throws Refused for an error event or a stream that breaks off.
export async function* chat(body, signal) {
  const response = await checked(await fetch("/v1/chat/completions", {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...body, stream: true }),
  }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused("the answer broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message);
      yield event;
    }
  }
}
