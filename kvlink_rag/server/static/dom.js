// Small help with the document.

export const byId = (id) => document.getElementById(id);

export const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);

export const shortName = (id) => id.split(/[\\/]/).filter(Boolean).pop() || id;
