// The page of an endpoint. What a model or a server says reaches the document as text only (textContent), never as markup.
"use strict";
const WORDS = {
  en: { compare: "Two models", fresh: "New chat", settings: "Settings", system: "System message", temperature: "Temperature", top_p: "Top p", max_tokens: "Most tokens", seed: "Seed",
        probabilities: "Token probabilities", probabilities_hint: "The paler a word, the less sure the model was. Point at it to see what else it considered.", key: "API key",
        key_hint: "Needed only where the server asks for one. It stays in this tab.", ask: "Ask something…", send: "Send", stop: "Stop", hello: "What would you like to know?", served: n => `${n} answers here.`,
        both: "Both models get the same question.", loading: "the model is loading…", away: "the server does not answer", needs_key: "this server wants an API key: open the settings",
        meta: (t, s, f) => `${t} tokens · ${s} tokens/s · first after ${f} s`, stopped: "stopped", cut: "the answer was cut at the limit", title: "aigc", good: "Good answer", bad: "Bad answer", why_good: "What was good about it?", why_bad: "What was wrong with it?",
        better: "What should it have said?", tell: "Send", later: "Not now", thanks: "Thank you.", noted: "Thank you, your words were kept." },
  zh: { compare: "对比两个模型", fresh: "新对话", settings: "设置", system: "系统消息", temperature: "温度", top_p: "Top p", max_tokens: "最多词元数", seed: "随机种子",
        probabilities: "显示词元概率", probabilities_hint: "颜色越浅，模型越没有把握。把指针放在词上，可以看到它考虑过的其他选择。", key: "API 密钥",
        key_hint: "只有服务器要求时才需要，只保存在这个标签页里。", ask: "说点什么……", send: "发送", stop: "停止", hello: "想了解什么？", served: n => `由 ${n} 回答。`,
        both: "两个模型会收到同一个问题。", loading: "模型正在加载……", away: "服务器没有响应", needs_key: "服务器需要 API 密钥：请打开设置",
        meta: (t, s, f) => `${t} 个词元 · 每秒 ${s} 个 · 首个用时 ${f} 秒`, stopped: "已停止", cut: "回答达到长度上限，被截断", title: "aigc", good: "回答得好", bad: "回答得不好", why_good: "好在哪里？", why_bad: "哪里不好？",
        better: "应该怎样回答？", tell: "发送", later: "以后再说", thanks: "谢谢。", noted: "谢谢，您的意见已保存。" },
};
const $ = id => document.getElementById(id);
const store = { get: k => { try { return sessionStorage.getItem(k); } catch { return null; } }, set: (k, v) => { try { sessionStorage.setItem(k, v); } catch { /* a private window may forbid it */ } } };
let language = store.get("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let models = [], columns = [], running = [], rates = false;   // rates: whether the server keeps what this key says about answers
const say = (key, ...more) => typeof WORDS[language][key] === "function" ? WORDS[language][key](...more) : WORDS[language][key];

function make(tag, className, text) {
  const el = document.createElement(tag);
  if (className) el.className = className;
  if (text !== undefined) el.textContent = text;
  return el;
}

function translate() {
  document.documentElement.lang = language;
  document.querySelectorAll("[data-say]").forEach(el => { el.textContent = say(el.dataset.say); });
  document.querySelectorAll("[data-hint]").forEach(el => { el.placeholder = say(el.dataset.hint); });
  document.querySelectorAll("[data-title]").forEach(name);
  $("language").textContent = language === "en" ? "中文" : "English";
  $("language").lang = language === "en" ? "zh" : "en";
  label();
  columns.forEach(c => c.greet());
}
const name = el => { el.title = say(el.dataset.title); el.setAttribute("aria-label", el.title); };
const label = () => { const text = say(running.length ? "stop" : "send"); $("send").setAttribute("aria-label", text); $("send").title = text; };

// Text with code in it: fences become blocks, back-ticks become code; everything by textContent.
function render(into, text) {
  into.replaceChildren();
  text.split(/^```/m).forEach((part, i) => {
    if (i % 2) { into.append(make("pre", "", part.replace(/^[^\n]*\n?/, ""))); return; }
    part.split("`").forEach((piece, j, all) => {
      if (j % 2 && j < all.length - 1) into.append(make("code", "", piece));
      else into.append(document.createTextNode(j % 2 ? "`" + piece : piece));
    });
  });
}

class Column {
  constructor(model) {
    this.model = model; this.messages = [];
    this.el = make("section", "column");
    const top = make("div", "top");
    this.choice = make("select"); this.choice.setAttribute("aria-label", "model");
    models.forEach(m => { const o = make("option", "", m); o.value = m; this.choice.append(o); });
    this.choice.value = model; this.choice.disabled = models.length < 2;
    this.choice.onchange = () => { this.model = this.choice.value; this.greet(); };
    top.append(this.choice);
    this.talk = make("div", "talk"); this.inner = make("div"); this.talk.append(this.inner);
    this.el.append(top, this.talk);
    this.greet();
  }
  greet() {
    if (this.messages.length) return;
    const empty = make("div", "empty");
    empty.append(make("h1", "", say("hello")), make("p", "", columns.length > 1 ? say("both") : say("served", this.model)));
    this.inner.replaceChildren(empty);
  }
  clear() { this.messages = []; this.greet(); }
  atEnd() { return this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 80; }
  scroll() { this.talk.scrollTop = this.talk.scrollHeight; }

  async ask(question, stopper) {
    if (!this.messages.length) this.inner.replaceChildren();
    this.messages.push({ role: "user", content: question });
    this.inner.append(make("div", "user", question));
    const box = make("div", "assistant busy"), text = make("div", "text");
    box.append(text); this.inner.append(box); this.scroll();
    const began = performance.now(), wants = $("probabilities").checked;
    let said = "", first = 0, tokens = 0, finish = "", fault = "", id = "";
    try {
      for await (const event of stream(this.body(wants), stopper.signal, answer => { id = answer.headers.get("x-request-id") || ""; })) {
        if (event.error) { fault = event.error.message; break; }
        if (event.usage) tokens = event.usage.completion_tokens;
        const choice = event.choices && event.choices[0];
        if (!choice) continue;
        finish = choice.finish_reason || finish;
        const stay = this.atEnd(), piece = choice.delta.content || "";
        if (piece && !first) first = performance.now() - began;
        said += piece;
        if (wants && choice.logprobs?.content) choice.logprobs.content.forEach(t => text.append(token(t)));
        else if (wants) text.append(piece);   // a gateway's guards leave no probabilities
        else if (piece) render(text, said);
        if (stay) this.scroll();
      }
    } catch (e) { if (e.name === "AbortError") finish = "aborted"; else fault = e.message; }
    box.classList.remove("busy");
    if (said) this.messages.push({ role: "assistant", content: said }); else if (fault) this.messages.pop();
    if (fault) box.append(make("div", "fault", fault));
    const seconds = (performance.now() - began - first) / 1000;
    const notes = [];
    if (tokens) notes.push(say("meta", tokens, tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : "–", (first / 1000).toFixed(2)));
    if (finish === "length") notes.push(say("cut"));
    if (finish === "aborted") notes.push(say("stopped"));
    if (notes.length) box.append(make("div", "meta", notes.join(" · ")));
    if (rates && id && said && !fault && finish !== "aborted") box.append(rating(id));
    this.scroll();
  }
  body(wants) {
    const system = $("system").value.trim(), seed = $("seed").value.trim();
    const body = { model: this.model, messages: [...(system ? [{ role: "system", content: system }] : []), ...this.messages], stream: true, stream_options: { include_usage: true },
                   temperature: Number($("temperature").value), top_p: Number($("top_p").value), max_tokens: Math.max(1, Math.round(Number($("max_tokens").value) || 512)) };
    if (seed) body.seed = Math.round(Number(seed));
    if (wants) Object.assign(body, { logprobs: true, top_logprobs: 5 });
    return body;
  }
}

// One token in the colour of its probability, with what else was considered.
function token(t) {
  const p = Math.exp(t.logprob), el = make("span", "token", t.token);
  el.style.backgroundColor = `rgb(var(--token) / ${(0.06 + 0.42 * p).toFixed(3)})`;
  const show = () => {
    const box = $("alternatives"), all = [...t.top_logprobs];
    if (!all.some(a => a.token === t.token)) all.push(t);
    box.replaceChildren(...all.sort((a, b) => b.logprob - a.logprob).map(a => {
      const q = Math.exp(a.logprob), row = make("div", a.token === t.token ? "chosen" : ""), bar = make("i");
      bar.style.width = `${(100 * q).toFixed(1)}%`;
      row.append(bar, make("b", "", visible(a.token)), make("span", "", q >= 0.001 ? `${(100 * q).toFixed(1)} %` : "< 0.1 %"));
      return row;
    }));
    box.hidden = false;
    const at = el.getBoundingClientRect(), size = box.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
    box.style.top = `${at.bottom + size.height + 12 > innerHeight ? at.top - size.height - 6 : at.bottom + 6}px`;
    document.querySelectorAll(".token.on").forEach(o => o.classList.remove("on"));
    el.classList.add("on");
  };
  const hide = () => { $("alternatives").hidden = true; el.classList.remove("on"); };
  el.onpointerenter = show; el.onpointerleave = e => { if (e.pointerType === "mouse") hide(); };
  return el;
}
const visible = text => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "␣") || "∅";

// Thumbs under an answer; a thumb is sent at once, words about it when they are there.
const THUMB = "M7 11v9H4v-9zm0 0 4-8a2.4 2.4 0 0 1 2.4 2.4V9h5.2a2 2 0 0 1 2 2.3l-1.2 7a2 2 0 0 1-2 1.7H7";
const SVG = document.querySelector("svg").namespaceURI;
function rating(id) {
  const el = make("div", "rate"), row = make("div", "thumbs"), status = make("span", "said"), form = make("form", "words");
  status.setAttribute("role", "status"); form.hidden = true;
  const field = hint => { const area = make("textarea"); area.rows = 2; area.maxLength = 4000; area.dataset.hint = hint; area.placeholder = say(hint); area.setAttribute("aria-label", say(hint)); return area; };
  const why = field("why_bad"), better = field("better"), send = make("button", "tell", say("tell")), later = make("button", "quiet", say("later"));
  send.type = "submit"; send.dataset.say = "tell"; later.type = "button"; later.dataset.say = "later";
  let chosen = "";
  const post = async (words, thanks) => {
    try {
      const answer = await fetch("v1/feedback", { method: "POST", headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify({ request_id: id, rating: chosen, ...words }) });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      status.dataset.say = thanks; status.textContent = say(thanks); status.classList.remove("bad"); return true;
    } catch (e) { delete status.dataset.say; status.textContent = e.message; status.classList.add("bad"); return false; }
  };
  const thumbs = ["up", "down"].map(way => {
    const b = make("button", `thumb ${way}`), svg = document.createElementNS(SVG, "svg"), path = document.createElementNS(SVG, "path");
    svg.setAttribute("viewBox", "0 0 24 24"); svg.setAttribute("aria-hidden", "true"); path.setAttribute("d", THUMB); svg.append(path); b.append(svg);
    b.type = "button"; b.dataset.title = way === "up" ? "good" : "bad"; name(b); b.setAttribute("aria-pressed", "false");
    b.onclick = async () => {
      chosen = way; thumbs.forEach(t => t.setAttribute("aria-pressed", t === b));
      why.dataset.hint = way === "up" ? "why_good" : "why_bad"; why.placeholder = say(why.dataset.hint); why.setAttribute("aria-label", why.placeholder);
      better.hidden = way === "up"; form.hidden = false;
      await post({}, "thanks");
    };
    return b;
  });
  form.onsubmit = async e => { e.preventDefault(); if (await post({ comment: why.value.trim(), correction: better.hidden ? "" : better.value.trim() }, "noted")) form.hidden = true; };
  later.onclick = () => { form.hidden = true; };
  const buttons = make("div", "thumbs"); buttons.append(send, later);
  row.append(...thumbs, status); form.append(why, better, buttons); el.append(row, form);
  return el;
}

const headers = () => { const key = $("key").value.trim(); return key ? { Authorization: `Bearer ${key}` } : {}; };

async function* stream(body, signal, begun) {
  const answer = await fetch("v1/chat/completions", { method: "POST", signal, headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(body) });
  if (!answer.ok) {
    let message = `${answer.status}`;
    try { message = (await answer.json()).error.message; } catch { /* not ours: the number will do */ }
    throw new Error(message);
  }
  begun(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter(l => l.startsWith("data:")).map(l => l.slice(5).trim()).join("");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function layout() {
  const two = $("compare").getAttribute("aria-pressed") === "true" && models.length > 1;
  while (columns.length > (two ? 2 : 1)) columns.pop();
  while (columns.length < (two ? 2 : 1)) columns.push(new Column(models[columns.length % models.length]));
  $("columns").replaceChildren(...columns.map(c => c.el));
  columns.forEach(c => c.greet());
}

async function ask(event) {
  event?.preventDefault();
  if (running.length) { running.forEach(s => s.abort()); return; }
  const question = $("question").value.trim();
  if (!question || !columns.length) return;
  $("question").value = ""; grow();
  running = columns.map(() => new AbortController());
  document.body.classList.add("busy"); label();
  await Promise.all(columns.map((c, i) => c.ask(question, running[i])));
  running = [];
  document.body.classList.remove("busy"); label();
  $("question").focus();
}

const grow = () => { const q = $("question"); q.style.height = "auto"; q.style.height = `${q.scrollHeight}px`; };
function tell(key, bad) { $("state").textContent = key ? say(key) : ""; $("state").classList.toggle("bad", !!bad); }

async function look() {
  try {
    const answer = await fetch("v1/models", { headers: headers() });
    if (answer.status === 401 || answer.status === 403) { tell("needs_key", true); return; }
    rates = answer.headers.get("x-aigc-feedback") === "1";
    const found = (await answer.json()).data.map(m => m.id);
    if (found.join() !== models.join()) { models = found; $("compare").hidden = models.length < 2; columns = []; layout(); }
    const ready = await fetch("ready");
    tell(ready.ok ? "" : "loading");
    if (!ready.ok) setTimeout(look, 1000);
  } catch { tell("away", true); setTimeout(look, 3000); }
}

document.addEventListener("DOMContentLoaded", () => {
  $("key").value = store.get("key") || "";
  $("key").onchange = () => { store.set("key", $("key").value); look(); };
  for (const id of ["temperature", "top_p"]) { const show = () => { $(`${id}-shown`).textContent = Number($(id).value).toFixed(2); }; $(id).oninput = show; show(); }
  $("composer").onsubmit = ask;
  $("question").oninput = grow;
  $("question").onkeydown = e => { if (e.key === "Enter" && !e.shiftKey && !e.isComposing) ask(e); };
  $("fresh").onclick = () => { running.forEach(s => s.abort()); columns.forEach(c => c.clear()); $("question").focus(); };
  $("language").onclick = () => { language = language === "en" ? "zh" : "en"; store.set("language", language); translate(); };
  $("more").onclick = () => { const open = $("settings").hidden; $("settings").hidden = !open; document.body.classList.toggle("set", open); $("more").setAttribute("aria-expanded", open); };
  $("compare").onclick = () => { $("compare").setAttribute("aria-pressed", $("compare").getAttribute("aria-pressed") !== "true"); columns = []; layout(); };
  document.addEventListener("pointerdown", e => { if (!e.target.classList.contains("token")) $("alternatives").hidden = true; });
  translate(); look(); $("question").focus();
});
