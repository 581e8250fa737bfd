// What holds of a page whatever it tells of. Answers a list of sentences, one for each fault.
// given.site: a page of the docs, whose looks are its theme's.
(given) => {
  const faults = new Set(), all = (q, of = document) => [...of.querySelectorAll(q)];
  const short = (text) => JSON.stringify((text || '').trim().slice(0, 50));
  const root = document.documentElement;
  const shown = (el) => el.checkVisibility({visibilityProperty: true, opacityProperty: true});

  if (root.scrollWidth > root.clientWidth) {
    const wide = all('body *').filter((el) => el.getBoundingClientRect().right > root.clientWidth + 1
      && !el.closest('.scroll, .md-typeset__scrollwrap, pre, svg') && shown(el)).slice(0, 3);
    faults.add(`${root.scrollWidth} wide where ${root.clientWidth} is there: `
      + wide.map((el) => `${el.tagName} ${el.className} ${short(el.textContent)}`).join('; '));
  }

  if (all('h1').length !== 1) faults.add(`${all('h1').length} h1`);
  let level = 0;
  for (const head of all('h1, h2, h3, h4, h5, h6').filter(shown)) {
    const mine = Number(head.tagName[1]);
    if (mine > level + 1) faults.add(`h${mine} below h${level}: ${short(head.textContent)}`);
    if (!head.textContent.trim()) faults.add('an empty heading');
    level = mine;
  }
  if (!document.title.trim() || !root.lang) faults.add('no title or no language');

  for (const img of all('img')) {
    if (!img.getAttribute('alt')?.trim()) faults.add(`img without alt ${short(img.src)}`);
    if (img.complete && !img.naturalWidth) faults.add(`img that is broken ${short(img.alt)}`);
  }
  for (const link of all('a[href^="#"]')) {
    const id = decodeURIComponent(link.getAttribute('href').slice(1));
    if (id && !document.getElementById(id)) faults.add(`a link to nowhere: #${id}`);
  }
  const ids = all('[id]').map((el) => el.id);
  const twice = ids.filter((id, at) => ids.indexOf(id) !== at);
  if (twice.length && !given.site) faults.add(`ids given twice: ${twice.slice(0, 3)}`);
  if (given.site) return [...faults];

  const odd = 'script, iframe, object, embed, form, base, link, audio, video';
  for (const el of all(odd)) faults.add(`an element that should not be: ${el.outerHTML.slice(0, 60)}`);
  for (const el of all('*')) for (const {name} of el.attributes) {
    if (/^on/i.test(name)) faults.add(`${el.tagName} has ${name}`);
  }
  const control = document.body.textContent.match(/[\x00-\x08\x0b-\x1f\x7f]/);
  if (control) faults.add(`a control character, ${control[0].charCodeAt(0)}`);
  for (const svg of all('svg')) {
    if (svg.getAttribute('role') !== 'img' || !svg.getAttribute('aria-label')?.trim())
      faults.add('a figure without a text');
  }
  for (const el of all('h2, h3, h4')) {
    const next = el.nextElementSibling;
    if (!next || (/^H[1-6]$/.test(next.tagName) && next.tagName <= el.tagName))
      faults.add(`nothing under ${short(el.textContent)}`);
  }

  // Labels of figures: inside of their figure, and none over another.
  for (const svg of all('svg').filter(shown)) {
    const frame = svg.getBoundingClientRect(), said = svg.getAttribute('aria-label');
    const boxes = all('text', svg).filter((el) => el.textContent.trim())
      .map((el) => [el.textContent.trim(), el.getBoundingClientRect()]);
    const letters = all('text', svg).map((el) => parseFloat(getComputedStyle(el).fontSize));
    const scale = frame.width / (svg.viewBox.baseVal.width || frame.width);
    if (Math.min(...letters) * scale < 7.5) faults.add(`letters too small in ${short(said)}`);
    boxes.forEach(([text, box], at) => {
      if (box.left < frame.left - 2 || box.right > frame.right + 2
        || box.top < frame.top - 2 || box.bottom > frame.bottom + 2)
        faults.add(`${short(text)} is cut off in the figure ${short(said)}`);
      for (const [other, its] of boxes.slice(at + 1)) {
        const x = Math.min(box.right, its.right) - Math.max(box.left, its.left);
        const y = Math.min(box.bottom, its.bottom) - Math.max(box.top, its.top);
        const least = Math.min(box.width * box.height, its.width * its.height);
        if (x > 0 && y > 0 && x * y > 0.2 * least)
          faults.add(`${short(text)} lies over ${short(other)} in the figure ${short(said)}`);
      }
    });
  }

  // Contrast, after WCAG 2.2, 1.4.3: 4.5 to 1, or 3 to 1 for large letters.
  const brush = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
    .getContext('2d', {willReadFrequently: true});
  const known = new Map();
  const rgba = (colour) => {
    if (!known.has(colour)) {
      brush.clearRect(0, 0, 1, 1);
      brush.fillStyle = colour;
      brush.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data;
      known.set(colour, [r, g, b, a / 255]);
    }
    return known.get(colour);
  };
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
  const behind = new Map();
  const ground = (el) => {
    if (!el) return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
    if (!behind.has(el))
      behind.set(el, over(rgba(getComputedStyle(el).backgroundColor), ground(el.parentElement)));
    return behind.get(el);
  };
  const light = (rgb) => rgb.map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const el = walk.currentNode.parentElement, text = walk.currentNode.data;
    if (!text.trim() || /^(STYLE|DEFS)$/i.test(el.tagName) || !shown(el)) continue;
    const style = getComputedStyle(el), drawn = el.closest('svg'), back = ground(el);
    const one = light(over(rgba(drawn ? style.fill : style.color), back)), two = light(back);
    const ratio = (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5))
      faults.add(`contrast ${ratio.toFixed(2)} of ${el.tagName} ${el.className.baseVal ?? el.className} ${short(text)}`);
  }
  return [...faults].slice(0, 25);
}
