// SPDX-License-Identifier: Apache-2.0
// Frames as the npm encoders of SOFABolt and Dubbo write them, one JSON object a line. See `make`.
'use strict';
const bolt = require('sofa-bolt-node/lib/protocol');
const DubboRequest = require('dubbo-remoting').Request || require('dubbo-remoting/lib/protocol/request');
const DubboResponse = require('dubbo-remoting/lib/protocol/response');
const Invocation = require('dubbo-remoting/lib/protocol/invocation');

const say = (by, protocol, bytes, expect) =>
  console.log(JSON.stringify({ by, protocol, hex: Buffer.from(bytes).toString('hex'), ...expect }));

const request = { serverSignature: 'com.a.DemoService:1.0', methodName: 'plus', timeout: 3000, args: [ 1, 2 ],
  methodArgSigs: [ 'int', 'int' ], requestProps: { rpc_trace_context: { sofaRpcId: '0' } } };
// Version 2 of the protocol has a checksum only from its second edition on, and if it is switched on.
for (const [ protocolType, boltVersion, crcEnable ] of [
  [ 'bolt', 1, false ], [ 'bolt2', 1, false ], [ 'bolt2', 2, false ], [ 'bolt2', 2, true ] ]) {
  const options = { protocolType, codecType: 'hessian2', boltVersion, crcEnable };
  const common = { version: protocolType === 'bolt' ? 1 : 2, crc: crcEnable };
  const by = 'sofa-bolt-node';
  say(by, 'bolt', bolt.requestEncode(1, request, options),
    { ...common, kind: 'Request', id: 1, service: request.serverSignature });
  say(by, 'bolt', bolt.requestEncode(70000, { ...request, oneway: true, serverSignature: 'com.b.\u4e2d\u6587:2.0:\u00e9' }, options),
    { ...common, kind: 'OneWay', id: 70000, service: 'com.b.\u4e2d\u6587:2.0:\u00e9' });
  say(by, 'bolt', bolt.heartbeatEncode(8, {}, options), { ...common, kind: 'Heartbeat', id: 8 });
  say(by, 'bolt', bolt.heartbeatAckEncode(8, options), { ...common, kind: 'HeartbeatAnswer', id: 8 });
  say(by, 'bolt', bolt.responseEncode(2, { isError: false, appResponse: { $class: 'int', $: 3 } }, options),
    { ...common, kind: 'Response', id: 2 });
}

const call = (path, version, args) => new Invocation({ methodName: 'plus', args,
  attachments: { dubbo: '5.3.0', path, interface: path, version, timeout: '3000' } });
const dubbo = (id, data, twoWay) => {
  const frame = new DubboRequest(id);
  frame.isTwoWay = twoWay;
  frame.data = data;
  return frame.encode({ codecType: 'hessian2' });
};
const long = 'com.a.' + 'Long'.repeat(40) + 'Service';
for (const [ path, version, twoWay ] of [
  [ 'com.a.DemoService', '1.0.0', true ], [ 'com.a.DemoService', '', true ], [ 'com.a.DemoService', '0.0.0', false ],
  [ long, '2.1', true ], [ 'com.a.\u4e2d\u6587\u00e9Service', '1.0', true ] ]) {
  say('dubbo-remoting', 'dubbo', dubbo(5, call(path, version, [ { $class: 'int', $: 1 }, { $class: 'java.lang.String', $: 'x' } ]), twoWay),
    { kind: twoWay ? 'Request' : 'OneWay', id: 5, service: path, of: version === '0.0.0' ? '' : version });
}
const heartbeat = new DubboRequest(9);
heartbeat.event = null;
say('dubbo-remoting', 'dubbo', heartbeat.encode({ codecType: 'hessian2' }), { kind: 'Event { two_way: true }', id: 9 });
const response = new DubboResponse(5);
response.status = 20;
response.data = { value: 3 };
say('dubbo-remoting', 'dubbo', response.encode({ codecType: 'hessian2' }), { kind: 'Response', id: 5 });
