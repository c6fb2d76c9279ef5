// The formats of docs/protocol.md, "Network", written a second time: names of files, frames, bulk
// files. Nothing here is shared with the Python code, so that the two check each other.
import { createHash } from 'node:crypto'
import { blake2b } from '@noble/hashes/blake2b'
import { createBLAKE2b } from 'hash-wasm'

export const GOSSIP = '/p2pfed/gossip/1'
export const BLOB = '/p2pfed/blob/1'

const CHUNK = 1 << 20
const HASH = 32
const NAMES_FILE = Buffer.alloc(16) // a personalisation is filled up with zeros
NAMES_FILE.write('p2pfed-file')

// The fast implementation has no personalisation, the other one is slow: each does its part.
const hasher = await createBLAKE2b(8 * HASH)
const hash = data => Buffer.from(hasher.init().update(data).digest('binary'))
export const sha256 = data => createHash('sha256').update(data).digest('hex')

/** Whole pieces of a stream, however they arrive. */
export class Reader {
  #pieces
  #held = Buffer.alloc(0)

  constructor (stream) {
    this.#pieces = stream.source[Symbol.asyncIterator]()
  }

  /** Exactly `count` bytes, or null when the stream ends before the first of them. */
  async exactly (count) {
    const whole = Buffer.alloc(count)
    let filled = 0
    while (filled < count) {
      if (this.#held.length === 0) {
        const { done, value } = await this.#pieces.next()
        if (done) {
          if (filled === 0) return null
          throw new Error(`the stream ended after ${filled} of ${count} bytes`)
        }
        this.#held = Buffer.from(value.subarray())
      }
      const taken = this.#held.copy(whole, filled)
      this.#held = this.#held.subarray(taken)
      filled += taken
    }
    return whole
  }
}

// -- frames ---------------------------------------------------------------------------------------

export function frame (payload) {
  const head = Buffer.from('PF01....')
  head.writeUInt32BE(payload.length, 4)
  return Buffer.concat([head, payload, hash(payload)])
}

/** The payloads of a stream, until it ends. */
export async function * frames (stream) {
  const reader = new Reader(stream)
  let head
  while ((head = await reader.exactly(8)) !== null) {
    if (head.toString('latin1', 0, 4) !== 'PF01') throw new Error('not a frame')
    const length = head.readUInt32BE(4)
    const payload = length > 0 ? await reader.exactly(length) : Buffer.alloc(0)
    if (!hash(payload).equals(await reader.exactly(HASH))) throw new Error('a wrong digest')
    yield payload
  }
}

// -- bulk files -----------------------------------------------------------------------------------

function chunksOf (body) {
  const chunks = []
  for (let at = 0; at < Math.max(1, body.length); at += CHUNK) {
    chunks.push(body.subarray(at, at + CHUNK))
  }
  return chunks
}

function nameOf (size, hashes) {
  if (hashes.length === HASH) return hashes
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(size))
  const whole = Buffer.concat([length, hashes])
  return Buffer.from(blake2b(whole, { dkLen: HASH, personalization: NAMES_FILE }))
}

/** A file that can be served: its content, its list of hashes, its name. */
export function file (body) {
  const hashes = Buffer.concat(chunksOf(body).map(hash))
  return { body, hashes, name: nameOf(body.length, hashes).toString('hex') }
}

/** Answer one request for a file; `find` gives one by its name, or undefined. */
export async function serveBlob (stream, find) {
  const request = await new Reader(stream).exactly(4 + HASH + 8 + 1)
  if (request?.toString('latin1', 0, 4) !== 'PFB2') throw new Error('not a request')
  const wanted = find(request.toString('hex', 4, 4 + HASH))
  const first = Number(request.readBigUInt64BE(4 + HASH))
  const total = Buffer.alloc(8, 0xff)
  if (wanted !== undefined) total.writeBigUInt64BE(BigInt(wanted.body.length))
  await stream.sink((function * () {
    yield total
    if (wanted === undefined) return
    if (request.at(-1) === 1) yield wanted.hashes
    yield * chunksOf(wanted.body).slice(first)
  })())
}

/** Fetch the file of this name and check the list, then each chunk as it comes. */
export async function fetchBlob (stream, name) {
  const request = Buffer.alloc(4 + HASH + 8 + 1)
  request.write('PFB2')
  request.write(name, 4, 'hex')
  request[request.length - 1] = 1
  const asking = stream.sink([request])
  const reader = new Reader(stream)
  const total = (await reader.exactly(8)).readBigUInt64BE()
  if (total === 0xffffffffffffffffn) throw new Error('the peer does not hold this file')
  const body = Buffer.alloc(Number(total))
  const chunks = chunksOf(body)
  const hashes = await reader.exactly(HASH * chunks.length)
  if (nameOf(body.length, hashes).toString('hex') !== name) throw new Error('a list of another file')
  for (const [index, place] of chunks.entries()) {
    const chunk = await reader.exactly(place.length)
    if (!hash(chunk).equals(hashes.subarray(HASH * index, HASH * (index + 1)))) {
      throw new Error(`chunk ${index} is wrong`)
    }
    chunk.copy(place)
  }
  await asking
  return body
}
