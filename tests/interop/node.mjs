// A member of a p2pfed network that is a js-libp2p node; led by tests/test_network_interop.py.
//
// First it prints its peer id and address; then it answers each line of its input, a command as
// JSON, with one line, {"done": …} or {"failed": …}. It ends with its input.
import { randomBytes } from 'node:crypto'
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'
import { BLOB, GOSSIP, fetchBlob, file, frame, frames, serveBlob, sha256 } from './wire.mjs'

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping() }
})

/** Values that somebody waits for, in order. */
class Mailbox {
  #waiting = []
  #values = []

  put (value) {
    const taker = this.#waiting.shift()
    taker === undefined ? this.#values.push(value) : taker(value)
  }

  take () {
    if (this.#values.length > 0) return Promise.resolve(this.#values.shift())
    return new Promise(resolve => this.#waiting.push(resolve))
  }
}

const heard = new Mailbox() // payloads of frames that peers sent
const outboxes = new Map() // of our gossip streams, by peer
const held = new Map() // files that we serve, by name

/** Serve a protocol; what fails is told on standard error and costs the stream. */
function serve (protocol, handler) {
  return node.handle(protocol, async ({ stream }) => {
    try {
      await handler(stream)
    } catch (error) {
      console.error(protocol, error)
      stream.abort(error)
    }
  })
}

await serve(BLOB, stream => serveBlob(stream, name => held.get(name)))
await serve(GOSSIP, async stream => {
  for await (const payload of frames(stream)) heard.put(payload.toString('hex'))
})

function connectionTo (peer) {
  const found = node.getConnections().find(one => one.remotePeer.toString() === peer)
  if (found === undefined) throw new Error(`not connected to ${peer}`)
  return found
}

async function outboxTo (peer) {
  if (!outboxes.has(peer)) {
    const stream = await connectionTo(peer).newStream(GOSSIP)
    const outbox = new Mailbox()
    outboxes.set(peer, outbox)
    stream.sink((async function * () {
      while (true) yield frame(await outbox.take())
    })()).catch(error => console.error('gossip', error))
  }
  return outboxes.get(peer)
}

const commands = {
  dial: async ({ address }) => (await node.dial(multiaddr(address))).remotePeer.toString(),
  ping: async ({ peer }) => await node.services.ping.ping(connectionTo(peer).remotePeer) / 1000,
  identify: async ({ peer }) => {
    const told = await node.services.identify.identify(connectionTo(peer))
    return {
      peer: told.peerId.toString(),
      agent: told.agentVersion,
      protocols: told.protocols,
      listen: told.listenAddrs.map(String),
      observed: told.observedAddr?.toString()
    }
  },
  send: async ({ peer, payload }) => (await outboxTo(peer)).put(Buffer.from(payload, 'hex')),
  hear: () => heard.take(),
  offer: ({ bytes }) => {
    const one = file(randomBytes(bytes))
    held.set(one.name, one)
    return { name: one.name, sha256: sha256(one.body) }
  },
  fetch: async ({ peer, name }) => {
    const body = await fetchBlob(await connectionTo(peer).newStream(BLOB), name)
    return { bytes: body.length, sha256: sha256(body) }
  }
}

const say = line => process.stdout.write(JSON.stringify(line) + '\n')

say({ peer: node.peerId.toString(), address: node.getMultiaddrs()[0].toString() })
for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...what } = JSON.parse(line)
  try {
    say({ done: await commands[command](what) ?? null })
  } catch (error) {
    say({ failed: error.stack })
  }
}
process.exit(0)
