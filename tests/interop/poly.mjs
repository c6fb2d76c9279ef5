// What the pinned packages need and Node 20 lacks; loaded before them by `node --import`.
Promise.withResolvers ??= function withResolvers () {
  const settle = {}
  settle.promise = new Promise((resolve, reject) => Object.assign(settle, { resolve, reject }))
  return settle
}
