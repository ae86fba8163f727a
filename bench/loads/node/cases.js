// Computations of one kind each; what they print depends on nothing but their code.
'use strict';
const crypto = require('crypto');
const zlib = require('zlib');

const digest = (data) => crypto.createHash('sha256').update(data).digest('hex');

function* numbers(seed, count) {
  for (let i = 0; i < count; i++) {
    seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff;
    yield seed >>> 4;
  }
}

class Task {
  constructor(id, priority) {
    this.id = id;
    this.priority = priority;
    this.inbox = [];
    this.state = id;
  }
  run(scheduler) {
    const packet = this.inbox.shift();
    this.state = (this.state * 31 + (packet ? packet.value : 7)) % 1000003;
    if (packet && packet.hops > 0) {
      scheduler.send(this.state % scheduler.tasks.length, { value: this.state, hops: packet.hops - 1 });
    }
  }
}

class IdleTask extends Task {
  run(scheduler) {
    scheduler.idle++;
    if (this.state++ % 8 === 0) scheduler.send(scheduler.idle % scheduler.tasks.length, { value: scheduler.idle, hops: 5 });
  }
}

class Scheduler {
  constructor() {
    this.idle = 0;
    this.tasks = [new IdleTask(0, 0)];
    for (let i = 1; i < 24; i++) this.tasks.push(new Task(i, i % 5));
  }
  send(id, packet) {
    this.tasks[id].inbox.push(packet);
  }
  step() {
    let best = this.tasks[0];
    for (const task of this.tasks) if (task.inbox.length > 0 && task.priority >= best.priority) best = task;
    best.run(this);
  }
}

const cases = {
  scheduler() {
    const scheduler = new Scheduler();
    for (let i = 0; i < 1500000 / (process.execArgv.length ? 10 : 1); i++) scheduler.step();
    return scheduler.tasks.map((task) => task.state).join(' ');
  },
  json() {
    let data = [...numbers(1, 20000)].map((n) => ({ id: n, name: `item ${n.toString(36)}`, tags: [n % 7, null, true], w: n / 7 }));
    let text;
    for (let i = 0; i < 8; i++) data = JSON.parse((text = JSON.stringify(data, null, i)));
    return digest(text);
  },
  regexp() {
    const text = [...numbers(2, 60000)].map((n) => `user${n % 997}@host${n % 31}.example.org ${n.toString(16)}`).join('\n');
    const hosts = new Map();
    for (const [, host] of text.matchAll(/[\w.]+@([\w.]+)\.org/g)) hosts.set(host, (hosts.get(host) || 0) + 1);
    const turned = text.replace(/\b([0-9a-f]{4})([0-9a-f]{3,4})\b/g, '$2-$1').replace(/(?<=host)(\d+)/gu, (n) => n * 2);
    return JSON.stringify([...hosts].slice(0, 3)) + digest(turned) + turned.split(/[^a-z]+/).length;
  },
  arrays() {
    const size = 192;
    const [a, b, c] = [0, 1, 2].map(() => new Float64Array(size * size));
    for (let i = 0; i < size * size; i++) [a[i], b[i]] = [(i % 13) - 6.5, 1 / ((i % 7) + 1)];
    for (let i = 0; i < size; i++)
      for (let k = 0; k < size; k++) for (let j = 0; j < size; j++) c[i * size + j] += a[i * size + k] * b[k * size + j];
    const bytes = new Uint8ClampedArray(3000000);
    for (let i = 0; i < bytes.length; i++) bytes[i] = 300 * Math.sin(i) * Math.cbrt(i % 1000);
    const ints = Int32Array.from(numbers(3, 400000)).sort();
    const view = new DataView(ints.buffer);
    let sum = 0n;
    for (let i = 0; i < 60000; i++) sum += view.getBigInt64(i * 8 + 4) ^ BigInt(i);
    return [digest(c), digest(bytes), digest(ints), sum].join(' ');
  },
  objects() {
    let tree = null;
    const insert = (node, key) => {
      if (!node) return { key, left: null, right: null, count: 1 };
      if (key < node.key) node.left = insert(node.left, key);
      else if (key > node.key) node.right = insert(node.right, key);
      else node.count++;
      return node;
    };
    for (const n of numbers(4, 150000)) tree = insert(tree, n % 40000);
    const walk = (node) => (node ? [...walk(node.left), node.key * node.count, ...walk(node.right)] : []);
    const map = new Map();
    for (const n of numbers(5, 200000)) map.set(`k${n % 30000}`, (map.get(`k${n % 30000}`) || 0) + 1);
    return digest(walk(tree).join()) + [...map].sort((x, y) => y[1] - x[1] || (x[0] < y[0] ? -1 : 1)).slice(0, 4);
  },
  // Functions that were compiled for one kind of value get others, over and over.
  deopt() {
    let sum = 0;
    for (let round = 0; round < 150; round++) {
      const add = new Function('a', 'b', `let s = 0; for (let i = 0; i < 4000; i++) s = s + a.x * i % 7 + b; return s + ${round};`);
      for (const a of [{ x: round }, { x: 1.5 }, { y: 1, x: round }, { x: '3' }, { x: 2 ** 40 }]) sum += add(a, a.x === 1.5 ? 0.25 : 1);
    }
    return sum;
  },
  // (func (export "f") (param i32) (result i32)): a loop of additions, multiplications and rotations.
  wasm() {
    const body = [
      1, 1, 0x7f, 0x41, 1, 0x21, 1, 0x03, 0x40, 0x20, 1, 0x20, 0, 0x6a, 0x41, 0xb5, 0x83, 0x88, 0x08, 0x6c, 0x41, 5, 0x77, 0x21, 1,
      0x20, 0, 0x41, 1, 0x6b, 0x22, 0, 0x0d, 0, 0x0b, 0x20, 1, 0x0b,
    ];
    const code = [0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, 1, 6, 1, 0x60, 1, 0x7f, 1, 0x7f, 3, 2, 1, 0, 7, 5, 1, 1, 0x66, 0, 0];
    code.push(0x0a, body.length + 2, 1, body.length, ...body);
    const { f } = new WebAssembly.Instance(new WebAssembly.Module(new Uint8Array(code))).exports;
    return [1, 1000, 100000000, 12345678].map(f).join(' ');
  },
  crypto() {
    const data = Buffer.from(Uint32Array.from(numbers(6, 700000)).buffer);
    const packed = zlib.deflateSync(data.subarray(0, 700000), { level: 6 });
    const key = crypto.pbkdf2Sync('password', 'salt', 60000, 32, 'sha512');
    const cipher = crypto.createCipheriv('aes-256-gcm', key, Buffer.alloc(12));
    const sealed = Buffer.concat([cipher.update(data), cipher.final(), cipher.getAuthTag()]);
    return [digest(packed), digest(sealed), digest(zlib.brotliCompressSync(data.subarray(0, 200000)))].join(' ');
  },
};

console.log(cases[process.argv[2]]());
