'use strict';
(() => {
  const TOP = 5, AT_ONCE = 2, KEPT = 40, PATIENCE = 60000, LONGEST_WAIT = 10;
  const FOR = [213, 94, 0], AGAINST = [0, 114, 178];
  const $ = (id) => document.getElementById(id);
  const cards = [], waiting = [];
  let info = null, token = '', running = 0;

  // ---------------------------------------------------------------- words

  // Names are data: what turns writing round, and control characters, are not shown.
  const clean = (text) => String(text).replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, '\ufffd');
  const short = (text, most = 80) => {
    const all = [...clean(text)];
    return all.length > most ? all.slice(0, most - 1).join('') + '\u2026' : all.join('');
  };
  const percent = (p) => `${(100 * p).toFixed(1)}\u00a0%`;
  const inWords = (p) => p >= 0.99 ? 'almost certain' : p >= 0.9 ? 'very likely'
    : p >= 0.7 ? 'likely' : p >= 0.4 ? 'perhaps' : 'hardly more than a guess';
  const sentence = (text) => {
    const all = clean(text).trim();
    return all && all[0].toUpperCase() + all.slice(1) + (/[.!?]$/.test(all) ? '' : '.');
  };
  const milliseconds = (x) => `${x < 10 ? x.toFixed(1) : Math.round(x)} ms`;
  const bytes = (n) => n >= 1e6 ? `${+(n / 1e6).toFixed(1)} MB` : n >= 1e3 ? `${Math.round(n / 1e3)} kB` : `${n} B`;
  const list = (names) => names.length < 2 ? names.join('') : `${names.slice(0, -1).join(', ')} and ${names[names.length - 1]}`;

  const make = (tag, className, text) => {
    const el = document.createElement(tag);
    if (className) el.className = className;
    if (text !== undefined) el.textContent = text;
    return el;
  };
  const say = (text) => { $('said').textContent = text; };

  // ---------------------------------------------------------------- the server

  class Problem extends Error {
    constructor(message, hint = '', more = {}) {
      super(message);
      Object.assign(this, {hint, status: 0, code: '', id: '', after: 0}, more);
    }
  }

  async function ask(path, options = {}) {
    const headers = {...options.headers};
    if (token) headers.Authorization = `Bearer ${token}`;
    let reply, body = null;
    try {
      reply = await fetch(path, {...options, headers, cache: 'no-store', credentials: 'omit',
        redirect: 'error', signal: AbortSignal.timeout(PATIENCE)});
    } catch (error) {
      throw error.name === 'TimeoutError'
        ? new Problem('The server did not answer within a minute.', 'Try again later.')
        : new Problem('The server cannot be reached.', 'Is it still running? Then try again.');
    }
    try { body = await reply.json(); } catch { /* said below */ }
    if (reply.ok && body) return body;
    const told = body?.error ?? {};
    throw new Problem(told.message ?? `The server answered ${reply.status} without a reason.`,
      told.hint ?? '', {status: reply.status, code: told.code ?? '', id: told.request_id ?? '',
        after: Number(reply.headers.get('Retry-After')) || 1});
  }

  async function learn() {
    try {
      info = await ask('info');
    } catch (problem) {
      if (problem.status === 401) return lock();
      say(`${sentence(problem.message)} ${sentence(problem.hint)}`);
      return false;
    }
    $('door').hidden = true;
    const {preprocess: {size: [height, width]}, limits} = info;
    $('model').textContent = `${short(info.architecture)} tells ${info.classes.length} `
      + `${info.classes.length === 1 ? 'class' : 'classes'} apart in pictures of ${width} \u00d7 ${height} pixels.`;
    $('limits').textContent = `${list(limits.formats)}, up to ${bytes(limits.bytes)} each. `
      + 'Pictures are sent to this server and to nobody else.';
    about();
    return true;
  }

  function about() {
    const several = info.task === 'multilabel', facts = [
      ['Classes', info.classes.slice(0, 200).map((name) => short(name, 60)).join(', ')
        + (info.classes.length > 200 ? ` and ${info.classes.length - 200} more` : '')],
      ['Names', several ? 'any number of classes to a picture' : 'one class to a picture'],
      ['Not sure', `below a confidence of ${percent(info.threshold)}. Confidence is about the classes alone: a picture of something else may get a high one, too.`],
      ['Computed by', `${info.engine}, ${info.precision}, ${info.threads} thread${info.threads === 1 ? '' : 's'}`],
      ['Bundle', info.bundle],
      ['crosspatch', info.version],
    ];
    $('facts').replaceChildren(...facts.map(([name, value]) => {
      const row = make('tr'), head = make('th', '', name);
      head.scope = 'row';
      row.append(head, make('td', '', clean(value)));
      return row;
    }));
    $('about').hidden = false;
  }

  function lock() {
    const wrong = token !== '';
    token = '';
    $('door').hidden = false;
    $('door-note').textContent = wrong ? 'The server does not take this token. Try another.'
      : 'It is kept until this page is closed, and nowhere else.';
    say(wrong ? 'The token is not right.' : 'This server asks for a token.');
    $('token').focus();
    return false;
  }

  $('door').addEventListener('submit', async (event) => {
    event.preventDefault();
    token = $('token').value.trim();
    if (/[^!-~]/.test(token)) { // no header can say it
      $('door-note').textContent = 'A token has letters, digits and marks of ASCII, and no spaces.';
      return;
    }
    if (!await learn()) return;
    $('token').value = '';
    say('The token is right.');
    $('files').focus();
    for (const card of cards.filter((one) => one.locked)) queue(card);
  });

  // ---------------------------------------------------------------- pictures

  function take(files, name) {
    const all = [...files];
    for (const file of all) {
      const card = {file, name: short(name ?? (file.name || 'picture'))};
      card.url = URL.createObjectURL(file);
      cards.unshift(card);
      draw(card);
      queue(card);
    }
    while (cards.length > KEPT) remove(cards[cards.length - 1]);
    if (all.length > 1) say(`${all.length} pictures.`);
    return all.length;
  }

  function queue(card) {
    card.locked = false;
    state(card, 'waiting');
    waiting.push(card);
    next();
  }

  async function next() {
    if (running >= AT_ONCE || !waiting.length) return;
    running += 1;
    const card = waiting.shift();
    try {
      if (!card.gone) await answer(card);
    } finally {
      running -= 1;
      next();
    }
    next();
  }

  async function answer(card, again = true) {
    state(card, 'asking the server');
    try {
      if (!card.file.size) throw new Problem('This file is empty.', 'Choose another.');
      if (info && card.file.size > info.limits.bytes)
        throw new Problem(`This file has ${bytes(card.file.size)}; the server takes ${bytes(info.limits.bytes)}.`,
          'Make the picture smaller.');
      const began = performance.now(), type = card.file.type;
      const found = await ask(`predict?top_k=${TOP}&seen=1${info?.explains ? '&explain=1' : ''}`, {
        method: 'POST', body: card.file,
        headers: {'Content-Type': type.startsWith('image/') ? type : 'application/octet-stream'},
      });
      if (!card.gone) show(card, found, performance.now() - began);
    } catch (problem) {
      if (card.gone) return;
      if (!(problem instanceof Problem)) throw problem;
      if (problem.status === 503 && again) {
        const seconds = Math.min(problem.after, LONGEST_WAIT);
        state(card, `the server is busy; asking again in ${seconds} s`);
        say(`The server is busy. ${card.name} is asked again in ${seconds} s.`);
        await new Promise((done) => setTimeout(done, 1000 * seconds));
        if (!card.gone) await answer(card, false);
        return;
      }
      fail(card, problem);
      if (problem.status === 401) { card.locked = true; lock(); }
    }
  }

  // ---------------------------------------------------------------- a card

  function draw(card) {
    const title = make('h2', '', card.name), close = make('button', 'quiet', 'Remove');
    const head = make('div', 'head');
    close.type = 'button';
    close.setAttribute('aria-label', `Remove ${card.name}`);
    close.addEventListener('click', () => { remove(card, true); });
    head.append(title, close);
    card.body = make('div', 'body');
    card.el = make('article');
    card.el.append(head, card.body);
    $('answers').prepend(card.el);
    $('clear').hidden = cards.length < 2;
  }

  function remove(card, focus = false) {
    const at = cards.indexOf(card);
    card.gone = true;
    cards.splice(at, 1);
    card.el.remove();
    URL.revokeObjectURL(card.url);
    $('clear').hidden = cards.length < 2;
    if (focus) {
      (cards[Math.min(at, cards.length - 1)]?.el.querySelector('button') ?? $('files')).focus();
      say(`${card.name} is removed.`);
    }
  }

  const state = (card, text) => card.body.replaceChildren(original(card), make('p', 'wait', text));

  function original(card) {
    const [figure, frame] = framed(card.url, `${card.name}, as it was sent`, 'as it was sent');
    frame.firstChild.addEventListener('error', () => {
      figure.replaceChildren(make('figcaption', '', 'This browser cannot show the file.'));
    });
    const shown = make('div', 'shown');
    shown.append(figure);
    return shown;
  }

  function framed(url, alt, caption) {
    const figure = make('figure'), frame = make('div', 'frame'), img = make('img');
    img.alt = alt;
    img.src = url;
    frame.append(img);
    figure.append(frame, make('figcaption', '', caption));
    return [figure, frame, img];
  }

  function fail(card, problem) {
    const told = make('div', 'told'), box = make('div', 'finding bad');
    const again = make('button', 'quiet', 'Try again');
    again.type = 'button';
    again.addEventListener('click', () => { queue(card); });
    box.append(make('p', 'badly', sentence(problem.message)));
    if (problem.hint) box.append(make('p', '', sentence(problem.hint)));
    if (problem.code) box.append(make('p', 'soft',
      `${problem.status} ${clean(problem.code)}${problem.id ? `, request ${clean(problem.id)}` : ''}`));
    told.append(box, again);
    card.body.replaceChildren(original(card), told);
    say(`${card.name}: ${sentence(problem.message)} ${sentence(problem.hint)}`);
  }

  function show(card, found, took) {
    const shown = original(card), told = make('div', 'told');
    let looked = null;
    if (found.seen?.startsWith('data:image/png;base64,')) {
      const size = info?.preprocess.size;
      const caption = `as the model saw it${size ? `: ${size[1]}\u00a0\u00d7\u00a0${size[0]} pixels` : ''}`;
      const [figure, frame, img] = framed(found.seen, `${card.name}, ${caption}`, caption);
      frame.classList.add('model');
      frame.classList.toggle('small', Boolean(size) && size[1] < 120);
      shown.append(figure);
      if (found.patches?.length) looked = looking(found, frame, img);
    }
    const answered = verdict(found, told);
    told.append(bars(found));
    if (looked) told.append(looked);
    card.body.replaceChildren(shown, told, timing(found, took));
    say(`${card.name}: ${answered}`);
  }

  function verdict(found, told) {
    const best = found.predictions[0], name = short(best.class), several = Boolean(found.labels);
    const words = several
      ? found.labels.length ? found.labels.map((one) => `${short(one.class)}, ${percent(one.probability)}`).join('; ')
        : 'none of the classes'
      : `${name}: ${inWords(best.probability)}, ${percent(best.probability)}`;
    told.append(make('p', 'verdict', words));
    if (!found.abstain) {
      if (!several) told.append(make('p', 'mark good', `\u2713 sure: at or above ${percent(found.threshold)}`));
      return `${words}.`;
    }
    const box = make('div', 'finding warn');
    box.append(make('p', 'doubt', '? Not sure'), make('p', '',
      `Its confidence, ${percent(found.confidence)}, is below ${percent(found.threshold)}. `
      + `Take what is named here for a guess: the picture may be unclear, or show something that none of the classes is made for.`));
    told.append(box);
    return `Not sure. The best guess is ${words}.`;
  }

  function bars(found) {
    const several = Boolean(found.labels), table = make('table', 'bars'), rows = make('tbody');
    table.classList.toggle('unsure', found.abstain);
    table.append(make('caption', '', several
      ? 'The most probable classes; a picture has those that reach their mark' : 'The most probable classes'));
    const said = new Set((found.labels ?? []).map((one) => one.class));
    for (const {class: name, probability} of found.predictions) {
      const row = make('tr'), head = make('th', '', short(name)), track = make('div', 'track');
      const fill = make('div', 'fill'), cell = make('td'), number = make('td', 'number', percent(probability));
      head.scope = 'row';
      fill.style.width = `${100 * Math.min(1, Math.max(0, probability))}%`;
      track.setAttribute('aria-hidden', 'true');
      track.append(fill);
      if (several) {
        const at = info?.thresholds?.[info.classes.indexOf(name)];
        if (at !== undefined) {
          const tick = make('div', 'tick');
          tick.style.left = `calc(${100 * at}% - 1px)`;
          track.append(tick);
        }
        head.prepend(make('span', said.has(name) ? 'mark good' : 'soft', said.has(name) ? '\u2713 ' : '\u2013 '));
        number.append(make('span', 'unseen', said.has(name) ? ', the picture has it' : ', the picture has it not'));
      }
      cell.append(track);
      row.append(head, cell, number);
      rows.append(row);
    }
    table.append(rows);
    return table;
  }

  function timing(found, took) {
    const t = found.timing_ms, beside = found.batch > 1 ? ` together with ${found.batch - 1} more` : '';
    return make('p', 'soft took', `${milliseconds(t.total)} in the server: ${milliseconds(t.decode)} reading the picture, `
      + `${milliseconds(t.queue)} waiting, ${milliseconds(t.compute)} computing${beside}. `
      + `${milliseconds(took)} with the way there and back. ${clean(found.image.format)}, `
      + `${found.image.width} \u00d7 ${found.image.height} pixels.`);
  }

  // ---------------------------------------------------------------- where it looked

  function looking(found, frame, img) {
    const scores = found.patches, rows = scores.length, columns = scores[0].length;
    const largest = Math.max(...scores.flat().map(Math.abs), 1e-12);
    const name = short(found.predictions[0].class, 40);
    const canvas = make('canvas'), pen = canvas.getContext('2d');
    canvas.width = columns;
    canvas.height = rows;
    const pixels = pen.createImageData(columns, rows);
    let place = [0, 0];
    scores.forEach((row, y) => row.forEach((value, x) => {
      const colour = value > 0 ? FOR : AGAINST;
      pixels.data.set([...colour, 255 * Math.abs(value) / largest], 4 * (y * columns + x));
      if (value > scores[place[0]][place[1]]) place = [y, x];
    }));
    pen.putImageData(pixels, 0, 0);
    canvas.hidden = true;
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', `What each of ${rows} by ${columns} patches gave to ${name}; `
      + `most came from row ${place[0] + 1}, column ${place[1] + 1}`);
    frame.append(canvas);

    const box = make('div', 'looking'), toggle = make('button', 'quiet', 'Show where it looked');
    const label = make('label', '', 'Strength'), slider = make('input'), note = make('p', 'soft');
    toggle.type = 'button';
    toggle.setAttribute('aria-pressed', 'false');
    Object.assign(slider, {type: 'range', min: '10', max: '100', value: '80'});
    label.append(slider);
    note.append(make('span', 'key for'), `spoke for \u201c${name}\u201d, `, make('span', 'key against'),
      'against it. This is what each patch gave to the class\u2019s score through attention, at first hand; what the '
      + 'network worked out from patches on the way is not in it. It is a hint of where the answer came from, no proof.');
    canvas.style.opacity = 0.8;
    slider.addEventListener('input', () => { canvas.style.opacity = slider.value / 100; });
    const set = (on) => {
      toggle.setAttribute('aria-pressed', String(on));
      canvas.hidden = label.hidden = note.hidden = !on;
      frame.classList.toggle('looked', on);
    };
    toggle.addEventListener('click', () => {
      set(canvas.hidden);
      say(canvas.hidden ? '' : `${canvas.getAttribute('aria-label')}.`);
    });
    set(false);
    box.append(toggle, label, note);
    return box;
  }

  // ---------------------------------------------------------------- ways in

  $('files').addEventListener('change', () => {
    take($('files').files);
    $('files').value = '';
  });
  let deep = 0;
  const over = (by) => {
    deep = Math.max(0, deep + by);
    document.body.classList.toggle('over', deep > 0);
  };
  document.addEventListener('dragenter', (event) => { event.preventDefault(); over(1); });
  document.addEventListener('dragleave', () => over(-1));
  document.addEventListener('dragover', (event) => { event.preventDefault(); });
  document.addEventListener('drop', (event) => {
    event.preventDefault();
    over(-Infinity);
    if (!take(event.dataTransfer.files)) say('No file was in what you dropped. Save the picture, and drop the file.');
  });
  document.addEventListener('paste', (event) => {
    if (event.target === $('token')) return;
    const files = [...event.clipboardData.files];
    const pasted = files.length === 1 && /^image\.png$/.test(files[0].name);
    if (!take(files, pasted ? 'pasted picture' : undefined)) say('There is no picture in the clipboard.');
  });
  $('clear').addEventListener('click', () => {
    while (cards.length) remove(cards[0]);
    $('files').focus();
    say('All are removed.');
  });

  $('curl').textContent = `curl --data-binary @picture.jpg ${new URL('predict', location.href)}`;
  $('app').hidden = false;
  learn();
})();
